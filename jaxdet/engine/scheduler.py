"""Which sequences run in the next step, and how many tokens of each."""

from collections import deque

from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.sequence import Sequence
from pallas_kernels.numerics import PAGE_SIZE


class Scheduler:
    """First come, first served. Prefill goes before decode; when pages run out the youngest sequence waits.

    Nothing here can change a bit: what a sequence computes does not depend on when, with whom or in what pieces.

    Args:
        pool: the KV pages.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens of one prefill step.
        max_prefill_seqs: sequences of one prefill step.
        chunked: whether a prompt may be split over several steps.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_prefill_seqs: int,
        chunked: bool,
    ):
        self.pool, self.chunked = pool, chunked
        self.max_num_seqs, self.max_prefill_seqs = max_num_seqs, max_prefill_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The next step's sequences with their token counts; all counts are 1 in a decode step."""
        self._admit()
        prefill = [s for s in self.running if s.pending > 1]
        return self._prefill(prefill) if prefill else self._decode()

    def finish(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and frees its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence.pages, poisoned=sequence.finish_reason == "error")
        sequence.pages = []

    def computed(self, sequence: Sequence, count: int) -> None:
        """Notes that `count` more tokens are in the cache; full pages become findable."""
        sequence.computed += count
        while (len(sequence.hashes) + 1) * PAGE_SIZE <= sequence.computed:
            page = len(sequence.hashes)
            tokens = sequence.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            previous = sequence.hashes[-1] if sequence.hashes else self.pool.root
            sequence.hashes.append(self.pool.extend_hash(previous, tokens))
            self.pool.remember(sequence.pages[page], sequence.hashes[-1])

    def restart(self) -> None:
        """After a failed step: no cached page is trusted and every running sequence starts over from its tokens."""
        while self.running:
            sequence = self.running[-1]
            del sequence.logprobs[sequence.num_output :], sequence.logits[sequence.num_output :]
            self._preempt(sequence)
        self.pool.forget_all()

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            # prompt_logprobs need every position's logits, so nothing may be skipped.
            if not sequence.unscored:
                sequence.pages, sequence.hashes = self.pool.match(sequence.tokens)
            sequence.computed = len(sequence.pages) * PAGE_SIZE
            if not sequence.num_output:
                sequence.cached = sequence.computed
            missing = -(-len(sequence.tokens) // PAGE_SIZE) - len(sequence.pages)
            if missing > self.pool.available:
                self.pool.release(sequence.pages)
                sequence.pages, sequence.hashes, sequence.computed = [], [], 0
                return
            sequence.pages += [self.pool.allocate() for _ in range(missing)]
            self.running.append(self.waiting.popleft())

    def _prefill(self, sequences: list[Sequence]) -> list[tuple[Sequence, int]]:
        budget, work = self.max_num_batched_tokens, []
        for sequence in sequences[: self.max_prefill_seqs]:
            count = min(sequence.pending, budget)
            if count == 0 or (count < sequence.pending and not self.chunked):
                break
            work.append((sequence, count))
            budget -= count
        return work

    def _decode(self) -> list[tuple[Sequence, int]]:
        for sequence in list(self.running):
            if sequence not in self.running or len(sequence.pages) * PAGE_SIZE >= len(sequence.tokens):
                continue
            while not self.pool.available and self.running[-1] is not sequence:
                self._preempt(self.running[-1])
            if self.pool.available:
                sequence.pages.append(self.pool.allocate())
            else:
                self._preempt(sequence)
        return [(sequence, 1) for sequence in self.running]

    def _preempt(self, sequence: Sequence) -> None:
        """Frees the sequence's pages; it starts over from its tokens later, to the same bits."""
        self.preemptions += 1
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.hashes, sequence.computed = [], [], 0
        self.waiting.appendleft(sequence)
