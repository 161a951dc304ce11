"""Guesses of a sequence's next tokens. The target model verifies them in one step; what it would have sampled stays.

The noise of a sampled token is a function of its position alone, so a guess is right exactly if it is the token that
the target samples there: outputs and log-probabilities are those of a run without guesses, bit for bit, greedy or not.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdet.engine.batch import KNOWN, model_batch, sampled, sampling_rows, slots_of
from jaxdet.engine.buckets import Buckets
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.engine.wanted import Programs
from jaxdet.models.layers import Batch
from pallas_kernels.numerics import PAGE_SIZE

LONGEST_NGRAM = 4
SHORTEST_NGRAM = 2
LOOKBACK = 4096
"""Tokens that an n-gram is looked up in."""


class Drafter(Protocol):
    """Guesses, and is told what the target computes."""

    def propose(self, limits: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        """Up to so many guesses for each sequence."""
        ...

    def follow(self, batch: Batch) -> None:
        """The target ran this batch."""
        ...

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """The target copied pages of its cache."""
        ...

    def reset(self) -> None:
        """The target lost its cache."""
        ...


class NgramDrafter:
    """Prompt lookup: what followed the last tokens when they occurred before (Saxena 2023)."""

    def propose(self, limits: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        return {sequence: _lookup(sequence.tokens[-LOOKBACK:], limit) for sequence, limit in limits.items()}

    def follow(self, batch: Batch) -> None: ...

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None: ...

    def reset(self) -> None: ...


def _lookup(tokens: list[int], limit: int) -> list[int]:
    """What came after the latest earlier occurrence of the longest possible ending."""
    ids = np.asarray(tokens)
    for size in range(min(LONGEST_NGRAM, len(ids) - 1), SHORTEST_NGRAM - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        found = np.flatnonzero((windows == ids[-size:]).all(axis=1))
        if found.size:
            after = int(found[-1]) + size
            return tokens[after : after + limit]
    return []


class ModelDrafter:
    """A small model that runs ahead of the target, in a cache with the target's page numbers.

    Whatever the target computes, this model computes too, so that both caches always hold the same prefixes.
    """

    def __init__(self, step: Step, buckets: Buckets, *, num_pages: int, table: int, slots: int):
        self._step, self._buckets = step, buckets
        self._num_pages, self._table, self._slots = num_pages, table, slots
        self.reset()

    @property
    def programs(self) -> Programs:
        """Its part of `Wanted`."""
        return Programs(self._step, self._cache, self._last)

    def reset(self) -> None:
        self._cache = self._step.new_cache(self._num_pages, PAGE_SIZE)
        self._last = jnp.zeros(self._slots, jnp.int32)

    def follow(self, batch: Batch) -> None:
        feed = np.full(batch.tokens.shape, KNOWN, np.int32)
        _, _, self._cache = self._step.run(self._cache, self._last, feed, batch)

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        self._cache = self._step.copy_pages(self._cache, sources, targets)

    def propose(self, limits: dict[Sequence, int]) -> dict[Sequence, list[int]]:
        # Guesses stay within the pages that a sequence has.
        limits = {s: min(n, len(s.pages) * PAGE_SIZE - s.length) for s, n in limits.items()}
        guessed = []
        for ahead in range(max(limits.values(), default=0)):
            parts = [Part(s, s.computed + ahead, 1, [], True) for s, limit in limits.items() if ahead < limit]
            plan = Plan(rows=parts)
            bucket = self._buckets.fit(len(parts), 0, 0)
            batch, feed = model_batch(plan, bucket, self._table)
            chosen = sampled(plan, bucket)
            _, logits, self._cache = self._step.run(self._cache, self._last, feed, batch)
            rows, slots = sampling_rows(chosen, bucket.sampled), slots_of(chosen, bucket.sampled, self._slots)
            tokens, _, self._last = self._step.draw(logits, rows, slots, self._last)
            guessed.append(([part.sequence for part in parts], tokens))
        drafts: dict[Sequence, list[int]] = {sequence: [] for sequence in limits}
        for (sequences, _), tokens in zip(guessed, jax.device_get([t for _, t in guessed]), strict=True):
            for sequence, token in zip(sequences, tokens.tolist(), strict=False):
                drafts[sequence].append(token)
        return drafts
