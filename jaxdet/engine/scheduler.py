"""Which sequences run in the next step, and how many tokens of each."""

import bisect
import dataclasses
from collections.abc import Iterator
from fractions import Fraction

from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.sequence import Sequence
from pallas_kernels.numerics import PAGE_SIZE

PATIENCE = 4
"""Decoding steps after which prompts get one of their own even if they don't fill it."""
MOST_WASTE = Fraction(1, 8)
"""Of the rows of several steps in a row, the share that may belong to sequences that are at their end by then."""


@dataclasses.dataclass(eq=False, slots=True)
class Part:
    """Tokens `start` to `start + count` of a sequence, the last of them guessed (`drafts`)."""

    sequence: Sequence
    start: int
    count: int
    drafts: list[int]
    samples: bool
    """Whether a next token is chosen: not in the middle of a prompt."""
    steps: int = 1
    """Tokens that are sampled one after the other, at most as many as the plan's steps."""


@dataclasses.dataclass
class Plan:
    """One step, or several in a row."""

    rows: list[Part] = dataclasses.field(default_factory=list)
    """Every token is a query of its own: decode, and drafts to verify."""
    chunks: list[Part] = dataclasses.field(default_factory=list)
    """Prefill."""
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """Pages to copy (from, to) before it."""
    steps: int = 1
    """How often every row is decoded, without the host in between."""

    def __bool__(self) -> bool:
        return bool(self.rows or self.chunks)

    def __iter__(self) -> Iterator[Part]:
        yield from self.rows
        yield from self.chunks


NO_DRAFTS: list[int] = []


class Scheduler:
    """Continuous batching: a step holds a token of each sequence that decodes and up to a budget of prompt tokens.

    Where more rows decode than are mixed with prompts (`buckets.MIXED_ROWS`), the two take turns, a step each: prompts
    that fill a step get every other one, fewer of them wait for up to PATIENCE steps to share the reading of the
    weights. Sequences are served by `Sequence.order`, and every one that was added gets its turn; when pages run out
    the last in order waits. Nothing here can change a bit: what a sequence computes does not depend on when, with whom
    or in what pieces.

    Args:
        pool: the KV pages.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: prompt tokens of one step.
        max_prefill_seqs: sequences with prompt tokens in one step.
        max_mixed_rows: decoding rows beside prompts, drafts included.
        chunked: whether a prompt may be split over several steps.
        early: whether a prompt's pages may be found before it has sampled its first token. Not where a NaN reaches
            tokens of the same prefill that are before it, and with them pages of which others know the tokens.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_seqs: int,
        max_mixed_rows: int,
        chunked: bool,
        early: bool,
    ):
        self.pool, self.chunked, self.early = pool, chunked, early
        self.max_num_seqs, self.max_prefill_seqs = max_num_seqs, max_prefill_seqs
        self.max_num_batched_tokens, self.max_mixed_rows = max_num_batched_tokens, max_mixed_rows
        self._decoded = PATIENCE
        """Steps since the last one with prompts."""
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        """Both in order."""
        self.preemptions = 0
        self._slots = list(reversed(range(max_num_seqs)))
        self._promised: dict[bytes, Sequence] = {}
        """Prefix hashes that a running sequence is about to compute."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=_order)

    def schedule(self, drafts: dict[Sequence, list[int]] | None = None, steps: int = 1) -> Plan:
        """The next step; empty if nothing can run before results of earlier steps are in.

        Args:
            drafts: guesses to verify, of sequences that decode.
            steps: how many steps may be taken at once where all sequences decode, without drafts.
        """
        plan = Plan()
        copied = self._admit(plan)
        budget = self.max_num_batched_tokens
        for sequence in list(self.running):
            # This loop runs for every sequence at every step: no calls where nothing is to be done.
            length, unseen = len(sequence.tokens) + sequence.in_flight, sequence.in_flight
            if unseen and length - len(sequence.prompt) >= sequence.max_tokens:  # maybe at its end
                continue
            if sequence.slot < 0:  # preempted by one before it
                continue
            pending = length - sequence.computed
            if pending == 1:
                guesses = drafts.get(sequence, NO_DRAFTS) if drafts else NO_DRAFTS
                # Nobody gives up a page for a guess.
                room = (len(sequence.pages) + self.pool.available) * PAGE_SIZE - length
                guesses = guesses[: max(room, 0)] if guesses else guesses
                length += len(guesses)
                if length <= len(sequence.pages) * PAGE_SIZE or self._make_room(sequence, length):
                    plan.rows.append(Part(sequence, sequence.computed, 1 + len(guesses), guesses, True))
            elif budget and len(plan.chunks) < self.max_prefill_seqs:
                count = min(pending, budget)
                if count == pending or self.chunked:
                    plan.chunks.append(Part(sequence, sequence.computed, count, NO_DRAFTS, count == pending))
                    budget -= count
                else:
                    budget = 0
        self.pool.release(copied)
        full = not budget or len(plan.chunks) == self.max_prefill_seqs
        if not self._take_turns(plan, full) and steps > 1 and plan.rows and not plan.chunks:
            self._repeat(plan, steps)
        for part in plan:
            sequence = part.sequence
            sequence.computed += part.count + part.steps - 1
            if part.samples:
                sequence.in_flight += part.steps + len(part.drafts)
            if sequence.computed >= sequence.register_at and (self.early or sequence.num_output):
                self.register(sequence)
        return plan

    def _take_turns(self, plan: Plan, full: bool) -> bool:
        """Leaves prompts or rows for a later step where there are too many rows for both; whether that is so.

        Args:
            full: whether the prompts fill a step.
        """
        apart = bool(plan.chunks) and sum(part.count for part in plan.rows) > self.max_mixed_rows
        if apart and self._decoded >= (1 if full else PATIENCE):
            plan.rows = []
        elif apart:
            plan.chunks = []
        self._decoded = 0 if plan.chunks else self._decoded + 1
        return apart

    def _repeat(self, plan: Plan, steps: int) -> None:
        """Makes one step several, if nobody needs the host, few come to their end on the way and pages are there."""
        if any(part.sequence.by_step for part in plan.rows):
            return
        counts = [
            min(steps, p.sequence.max_tokens - p.sequence.length + len(p.sequence.prompt)) for p in plan.rows
        ]
        if steps * len(counts) - sum(counts) > MOST_WASTE * steps * len(counts):
            return
        missing = [
            max(0, -(-(part.start + count) // PAGE_SIZE) - len(part.sequence.pages))
            for part, count in zip(plan.rows, counts, strict=True)
        ]
        if sum(missing) > self.pool.available:
            return
        plan.steps = steps
        for part, count, pages in zip(plan.rows, counts, missing, strict=True):
            part.steps = count
            part.sequence.pages += [self.pool.allocate() for _ in range(pages)]

    def finish(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and frees its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._leave(sequence, poisoned=sequence.finish_reason == "error")
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def register(self, sequence: Sequence) -> None:
        """Makes pages findable that are full, or will be after the steps under way, and whose tokens are known."""
        known, prefix = min(sequence.computed, len(sequence.tokens)), sequence.prefix
        if sequence.slot < 0 or prefix is None:
            return
        while (len(sequence.hashes) + 1) * PAGE_SIZE <= known:
            page = len(sequence.hashes)
            if page < len(prefix.pages):
                key = prefix.pages[page]
            else:
                tokens = sequence.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                key = self.pool.extend_hash(sequence.hashes[-1] if page else self.pool.root, tokens)
            sequence.hashes.append(key)
            self._keep(sequence, page, key)
        sequence.register_at = (len(sequence.hashes) + 1) * PAGE_SIZE
        if prefix.tail is not None and sequence.register_at > prefix.length - 1:
            if known >= prefix.length - 1:
                self._keep(sequence, len(prefix.pages), prefix.tail)
            else:
                sequence.register_at = prefix.length - 1

    def restart(self) -> None:
        """After a step that failed, maybe in the midst of bookkeeping: everybody starts over from their tokens."""
        everyone = dict.fromkeys([*self.running, *self.waiting])
        # They stay in the queues until all is done: this may be interrupted, too.
        for sequence in everyone:
            sequence.start_over()
        self._slots, self._promised = list(reversed(range(self.max_num_seqs))), {}
        self.pool.clear()
        waiting = sorted((s for s in everyone if s.finish_reason is None), key=_order)
        self.running, self.waiting = [], waiting

    def _admit(self, plan: Plan) -> list[int]:
        """Lets waiting sequences in; returns pages that must live until they are copied."""
        copied: list[int] = []
        for sequence in list(self.waiting):
            if len(self.running) == self.max_num_seqs:
                break
            if sequence.in_flight:
                continue
            if sequence.prefix is None or sequence.prefix.length != len(sequence.tokens):
                sequence.prefix = self.pool.prefix(sequence.tokens)
            # prompt_logprobs need every position's logits, so nothing may be skipped.
            shared = self.pool.caching and not sequence.unscored
            if shared and self._is_coming(sequence):
                continue
            pages, tail = self.pool.match(sequence.prefix) if shared else ([], None)
            missing = -(-len(sequence.tokens) // PAGE_SIZE) - len(pages)
            if tail is not None and missing > self.pool.available:
                self.pool.release([tail])  # it may be the very page that is missing
                tail = None
            if missing > self.pool.available:
                self.pool.release(pages)
                break
            own = [self.pool.allocate() for _ in range(missing)]
            sequence.computed = len(pages) * PAGE_SIZE
            if tail is not None:
                plan.copies.append((tail, own[0]))
                copied.append(tail)
                sequence.computed = len(sequence.tokens) - 1
            sequence.hashes = sequence.prefix.pages[: len(pages)]
            sequence.pages, sequence.register_at = pages + own, 0
            if not sequence.admitted:
                sequence.admitted, sequence.cached = True, sequence.computed
            bisect.insort(self.running, sequence, key=_order)
            self.waiting.remove(sequence)
            sequence.slot = self._slots.pop()
            if shared:
                for key in sequence.prefix.keys:
                    if not self.pool.known(key):
                        self._promised.setdefault(key, sequence)
        return copied

    def _is_coming(self, sequence: Sequence) -> bool:
        """Whether another sequence is about to compute the next part of this one's prompt."""
        assert sequence.prefix is not None
        missing = next((key for key in sequence.prefix.keys if not self.pool.known(key)), None)
        return missing in self._promised

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` tokens, taken from the last in order if need be; False if that is this one."""
        while len(sequence.pages) * PAGE_SIZE < length:
            if self.pool.available:
                sequence.pages.append(self.pool.allocate())
            else:
                self._preempt(self.running[-1])
                if sequence.slot < 0:
                    return False
        return True

    def _keep(self, sequence: Sequence, page: int, key: bytes) -> None:
        self.pool.remember(sequence.pages[page], key)
        if self._promised.get(key) is sequence:
            del self._promised[key]

    def _leave(self, sequence: Sequence, *, poisoned: bool = False) -> None:
        self.pool.release(sequence.pages, poisoned=poisoned)
        self._slots.append(sequence.slot)
        for key in sequence.prefix.keys if sequence.prefix else ():
            if self._promised.get(key) is sequence:
                del self._promised[key]
        sequence.pages, sequence.hashes, sequence.computed, sequence.slot = [], [], 0, -1

    def _preempt(self, sequence: Sequence) -> None:
        """Frees the sequence's pages; it starts over from its tokens later, to the same bits."""
        self.preemptions += 1
        self.add(sequence)
        self.running.remove(sequence)
        self._leave(sequence)


def _order(sequence: Sequence) -> int:
    return sequence.order
