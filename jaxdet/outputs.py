"""What a request gives back; names follow vLLM's."""

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Logprob:
    """log-probability of one token under the raw distribution (before penalties and temperature)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One of a request's `n` completions."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum of the chosen tokens' logprobs; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    """"stop", "length", "error" (the logits were NaN), or None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""
    logits: Float[np.ndarray, "T V"] | None = None
    """The logits behind every token, float32; None unless the LLM keeps them."""


@dataclasses.dataclass
class RequestOutput:
    """A prompt and its completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry per prompt token; the first is None."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """Teacher-forced logprobs of given tokens; entry i belongs to token i + 1."""

    token_ids: list[int]
    logprobs: list[float]
