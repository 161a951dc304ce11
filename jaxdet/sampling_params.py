"""What one request asks of the sampler."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5
HOTTEST = 3e38
"""About the largest float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, named as vLLM names them. All of them are per request; none touches a batch-mate.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names the argument and its limit.
    """

    n: int = 1
    """Completions per prompt; they differ by their sample index, not by their seed."""
    temperature: float = 1.0
    """0 is greedy, and so is anything below 1e-5."""
    top_p: float = 1.0
    """Sample among the most likely tokens that make up this probability, in (0, 1] (after min_p and top_k)."""
    top_k: int = 0
    """Sample among this many of the most likely tokens; 0 or −1: off."""
    min_p: float = 0.0
    """Sample among tokens at least this times as likely as the likeliest one, in [0, 1] (after temperature)."""
    repetition_penalty: float = 1.0
    """Logits of tokens in prompt or output are divided by it if positive and multiplied if negative, in [0.01, 100]."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, in [−2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for every time that it occurs in the output, in [−2, 2]."""
    max_tokens: int | None = 16
    """The most tokens of one completion; None: up to max_model_len, which limits them anyway."""
    min_tokens: int = 0
    """Until then no end-of-sequence token, stop token or stop string ends the output."""
    seed: int | None = None
    """In [0, 2⁶⁴); None: the engine's seed, so that identical requests get identical answers."""
    stop: str | Sequence[str] = ()
    """Text that ends the output; None counts as ()."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the output, beside the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens."""
    include_stop_str_in_output: bool = False
    """Keep the text of what ended the output, a stop string or a stop token."""
    logprobs: int | None = None
    """How many of the most likely tokens to report beside the chosen one (0–20), of the raw distribution."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first; such a request computes its whole prompt, cached or not."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Token id → what is added to its logit first of all, in [−100, 100]."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text; `token_ids` has them."""

    def __post_init__(self):
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            self._convert(name, bool, _is_bool, "True or False")
        for name in ("n", "top_k", "min_tokens"):
            self._convert(name, int, _is_int, "a whole number")
        for name in ("max_tokens", "seed", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._convert(name, int, _is_int, "a whole number, or None")
        for name in ("temperature", "top_p", "min_p"):
            self._convert(name, float, _is_real, "a number")
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._convert(name, float, _is_real, "a number")
        for name in ("stop", "stop_token_ids"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._convert("stop", tuple, _all(lambda s: isinstance(s, str)), "a string or a list of strings")
        self._convert("stop_token_ids", _ints, _all(_is_int), "a list of token ids")
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        self._convert("logit_bias", _biases, _is_biases, "a mapping from token ids to numbers")
        self._check_ranges()
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.temperature < GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)

    def _convert(self, name: str, to: Callable, holds: Callable[[Any], bool], wanted: str) -> None:
        """Checks a field's type and makes it a plain Python value (NumPy's numbers are welcome)."""
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")
        object.__setattr__(self, name, to(value))

    def _check_ranges(self) -> None:
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= HOTTEST, "0 (greedy) or more, and finite in float32"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= -1, "0 or -1 (off), or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]; 1 is off"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1, or None"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "in [0, max_tokens]"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "in [0, 2**64), or None"),
            ("stop", all(self.stop), "without empty strings"),
            ("logprobs", self._countable(self.logprobs), f"in [0, {MAX_LOGPROBS}], or None"),
            ("prompt_logprobs", self._countable(self.prompt_logprobs), f"in [0, {MAX_LOGPROBS}], or None"),
        )
        for name, fine, limit in checks:
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {limit}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token}]={bias!r} must be in [-100, 100]")

    @staticmethod
    def _countable(value: int | None) -> bool:
        return value is None or 0 <= value <= MAX_LOGPROBS


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _all(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Sequence | set | frozenset) and all(map(holds, value))


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _is_biases(value: Any) -> bool:
    """Ids may be decimal strings, as JSON has them."""
    return isinstance(value, Mapping) and all(
        (_is_int(k) or (isinstance(k, str) and k.isdecimal())) and _is_real(v) for k, v in value.items()
    )


def _biases(value: Mapping[Any, float]) -> dict[int, float]:
    return {int(k): float(v) for k, v in value.items()}
