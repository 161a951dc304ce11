"""What one request asks of the sampler."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, named as vLLM names them. All of them are per request; none touches a batch-mate.

    Raises:
        ValueError: a value is out of range; the message names the argument, its limit and the remedy.
    """

    n: int = 1
    """Completions per prompt; they differ by their sample index, not by their seed."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or −1: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 16
    """None: up to max_model_len."""
    min_tokens: int = 0
    seed: int | None = None
    """None: the engine's seed, so that identical requests get identical answers."""
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """How many of the most likely tokens to report beside the chosen one (0–20), of the raw distribution."""
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    skip_special_tokens: bool = True

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0) if self.top_k >= -1 else self.top_k)
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in self.logit_bias.items()})
        checks = (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 or -1 (off), or at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "greater than 0"),
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
