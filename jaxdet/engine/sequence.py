"""One running completion: its tokens, its pages and how far they are computed."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
from jaxtyping import UInt32

from jaxdet.engine.kv_cache import Prefix
from jaxdet.sampling_params import SamplingParams

Entry = tuple[float, int, list[float], list[int]]
"""Of a token: its logprob, its rank, the top logprobs and their ids."""

TINY = float(np.finfo(np.float32).tiny)
MOST_TOP_K = np.iinfo(np.int32).max

log = logging.getLogger(__name__)


class Constraint(Protocol):
    """Which tokens one completion may go on with, a pure function of its tokens."""

    def allowed(self, guesses: list[int]) -> UInt32[np.ndarray, " words"]:
        """Bit i % 32 of word i // 32 says whether token i may follow the output so far and `guesses`.

        What follows a guess that isn't allowed itself is never asked for. No token at all ends the completion with
        "error".
        """
        ...

    def append(self, token: int) -> None:
        """Takes the token that was sampled."""
        ...

    def copy(self) -> Self:
        """The same state, on its own from now on."""
        ...


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
    grammar: Constraint | None = None
    """A constraint at the beginning of the output; nobody moves it on."""
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
    register_at: int = 0
    """Known and computed tokens from which on there is another prefix to make findable."""
    prefix: Prefix | None = None
    """Hashes of what it had when it was last admitted."""
    admitted: bool = False
    """Whether it ever ran."""
    cached: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[Entry] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[Entry] = dataclasses.field(default_factory=list)
    keep_logits: bool = False
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)
    """Per output token its float32 logits, if they are kept."""
    counts: dict[int, int] = dataclasses.field(default_factory=dict)
    """How often each id occurs in the output, if it is penalised."""
    constraint: Constraint | None = dataclasses.field(init=False)
    """The grammar after the output so far."""
    broken: bool = False
    """Whether the constraint raised."""
    penalised: bool = dataclasses.field(init=False)
    needs_last_token: bool = dataclasses.field(init=False)
    """Whether what was sampled last has a say in the next choice, so that the host must know it by then."""
    by_step: bool = dataclasses.field(init=False)
    """Whether the host has a part in every single step of it."""
    adjusted: bool = dataclasses.field(init=False)
    """Whether any of its logits are biased, banned or penalised."""
    sampling: tuple[float, ...] = dataclasses.field(init=False)
    """temperature, top_k, top_p, min_p, the seed's low and high half, sample index."""

    def __post_init__(self):
        self.tokens = list(self.prompt)
        p = self.params
        self.penalised = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1, 0, 0)
        self.constraint = self.grammar and self.grammar.copy()
        self.needs_last_token = self.penalised or self.constraint is not None
        self.adjusted = self.penalised or bool(p.logit_bias) or p.min_tokens > 0
        wanted = p.logprobs is not None or self.keep_logits or self.max_tokens == 0
        self.by_step = wanted or self.adjusted or self.needs_last_token
        # A top_p that float32 rounds to 0 would keep nothing; the smallest normal number keeps the best token.
        cuts = (min(p.top_k, MOST_TOP_K), max(p.top_p, TINY)) if p.temperature else (0, 1)
        halves = self.seed & 0xFFFFFFFF, self.seed >> 32
        self.sampling = (p.temperature, *cuts, p.min_p, *halves, self.sample_index)

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
    def unscored(self) -> bool:
        """Whether logprobs of prompt tokens are wanted and not all there."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    def append(self, token: int) -> None:
        """Takes a sampled token and notes whether it ends the sequence."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.ask(self.constraint.append, token)
        if self.penalised:
            self.counts[token] = self.counts.get(token, 0) + 1
        self._note_end(token)

    def ask[T](self, question: Callable[..., T], *args: Any) -> T | None:
        """What the constraint, which is the user's code, answers; if it raises, this sequence ends with an error."""
        try:
            return question(*args)
        except Exception:
            log.exception("request %s: its constraint failed", self.request_id)
            self.broken = True
            return None

    def start_over(self) -> None:
        """Forgets all but the tokens and what follows from them, wherever `append` was interrupted."""
        self.pages, self.hashes, self.computed, self.slot, self.in_flight = [], [], 0, -1, 0
        del self.logprobs[self.num_output :], self.logits[self.num_output :]
        if self.grammar is not None:
            self.constraint = self.grammar.copy()
            for token in self.output:
                self.ask(self.constraint.append, token)
        if self.penalised:
            self.counts = dict(Counter(self.output))
        if self.num_output and self.finish_reason is None:
            self._note_end(self.tokens[-1])

    def _note_end(self, token: int) -> None:
        count = len(self.tokens) - len(self.prompt)
        if self.broken:
            self.finish_reason = "error"
        elif token in self.stop_ids and count >= self.params.min_tokens:
            self.finish_reason = "stop"
            self.stop_reason = token if token in self.params.stop_token_ids else None
        elif count >= self.max_tokens:
            self.finish_reason = "length"
