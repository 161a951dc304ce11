"""One running completion: its tokens, its pages and how far they are computed."""

import dataclasses

import numpy as np

from jaxdet.engine.kv_cache import Prefix
from jaxdet.sampling_params import SamplingParams


@dataclasses.dataclass(eq=False)
class Sequence:
    """Token ids only; text lives outside the engine."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    sample_index: int
    seed: int
    max_tokens: int
    """0: nothing but the prompt's logprobs is wanted."""
    stop_ids: frozenset[int]
    """End-of-sequence and stop tokens; empty under ignore_eos without stop_token_ids."""
    order: int = 0
    """Whose turn it is: lower goes first, is preempted last."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache, or will be after the steps that were handed to the device."""
    in_flight: int = 0
    """Tokens that such steps will sample: they have a position, but nobody has seen them yet."""
    slot: int = -1
    """Place of its last token on the device, while it runs."""
    pages: list[int] = dataclasses.field(default_factory=list)
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    """Prefix hash of each full page."""
    prefix: Prefix | None = None
    """Hashes of what it had when it was last admitted."""
    cached: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[tuple[float, int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    """Per output token: (logprob, rank, top logprobs, top ids)."""
    prompt_logprobs: list[tuple[float, int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    """Per output token its float32 logits, when the engine keeps them."""
    counts: dict[int, int] = dataclasses.field(default_factory=dict)
    """How often each id occurs in the output."""

    def __post_init__(self):
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def pending(self) -> int:
        """Tokens still to be computed; 1 means that the sequence decodes."""
        return self.length - self.computed

    @property
    def ready(self) -> bool:
        """Whether a next token is wanted for sure, as far as lengths tell."""
        return self.in_flight == 0 or self.num_output + self.in_flight < self.max_tokens

    @property
    def needs_last_token(self) -> bool:
        """Whether its next logits are adjusted by what was sampled last, which the host must know by then."""
        p = self.params
        return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0

    @property
    def unscored(self) -> bool:
        """Whether logprobs of prompt tokens are wanted and not all there."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    def append(self, token: int) -> None:
        """Takes a sampled token and notes whether it ends the sequence."""
        self.tokens.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if token in self.stop_ids and self.num_output >= self.params.min_tokens:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif self.num_output >= self.max_tokens:
            self.finish_reason = "length"
