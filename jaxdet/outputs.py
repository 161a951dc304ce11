"""What a request gives back; names follow vLLM's."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Logprob:
    """log-probability of one token under the raw distribution (before penalties and temperature)."""

    logprob: float
    """Natural logarithm of the probability, in float32."""
    rank: int
    """1 for the most likely token; of equals, the lower id comes first."""
    decoded_token: str | None = None
    """Its text."""


@dataclasses.dataclass
class CompletionOutput:
    """One of a request's `n` completions."""

    index: int
    """Which of the `n` it is, from 0."""
    text: str
    """The output as text: without what ended it and without special tokens, unless `SamplingParams` ask for them."""
    token_ids: list[int]
    """All sampled tokens, those that ended it included."""
    cumulative_logprob: float | None = None
    """Sum of the chosen tokens' logprobs; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """Per token, id → Logprob of the chosen token (first) and of the most likely ones; None unless asked for."""
    finish_reason: str | None = None
    """"stop", "length", "abort", "error" (unusable logits, such as NaN), or None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""
    logits: Float[np.ndarray, "T V"] | None = None
    """The logits behind every token, float32; None unless the LLM keeps them."""


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    """The engine's number for it."""
    prompt: str | None
    """The prompt's text, if it came as text."""
    prompt_token_ids: list[int]
    """The tokens that ran."""
    outputs: list[CompletionOutput]
    """Its `n` completions, by index."""
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry per prompt token, like `CompletionOutput.logprobs`; the first is None. None unless asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(o.finish_reason is not None for o in self.outputs)


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """Teacher-forced logprobs of given tokens; entry i belongs to token i + 1."""

    token_ids: list[int]
    """The tokens that were asked about."""
    logprobs: list[float]
    """log p(token i + 1 | tokens 0…i), natural, of the raw distribution: one fewer than tokens."""
