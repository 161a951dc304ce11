"""Sequences of any length, packed into micro-batches of few shapes."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxdet.models.layers import Batch
from pallas_kernels.arrays import HostOrDevice, round_up
from pallas_kernels.numerics import GRADIENT_ROWS, PAGE_SIZE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Whole sequences, one after the other, each filled up to a multiple of GRADIENT_ROWS tokens.

    What fills up comes after a sequence's own tokens, so that none of them sees it. The rest of the T tokens is one
    more sequence.
    """

    batch: Batch
    """Tokens, positions and pages of a cache of its own."""
    targets: Int[HostOrDevice, " T"]
    """The token that follows each."""
    scored: Bool[HostOrDevice, " T"]
    """Whether a token of the same sequence follows at all."""

    @property
    def num_pages(self) -> int:
        """Cache pages that its tokens need, the trash page included."""
        return self.batch.tokens.shape[0] // GRADIENT_ROWS + 1


def pack(sequences: Sequence[Sequence[int]], micro_batch_tokens: int) -> list[tuple[MicroBatch, list[slice]]]:
    """Packs sequences, in their order, into as few micro-batches as that order allows.

    Args:
        sequences: token ids, at least one each.
        micro_batch_tokens: the largest T, rounded up to a multiple of GRADIENT_ROWS; the longest sequence must fit.

    Returns:
        The micro-batches, and where each sequence's tokens are. T is halved as long as a micro-batch still fits, so few
        programs run them all, and few sequences cost little.

    Raises:
        ValueError: a sequence is empty or doesn't fit.
    """
    size = round_up(micro_batch_tokens, GRADIENT_ROWS)
    groups: list[list[Sequence[int]]] = [[]]
    used = 0
    for i, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= size:
            raise ValueError(
                f"sequence {i} has {len(sequence)} tokens; give it from 1 to micro_batch_tokens={size}, or raise that"
            )
        length = round_up(len(sequence), GRADIENT_ROWS)
        if used + length > size:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += length
    return [_micro_batch(group, size) for group in groups if group]


def _micro_batch(sequences: list[Sequence[int]], size: int) -> tuple[MicroBatch, list[slice]]:
    lengths = [round_up(len(s), GRADIENT_ROWS) for s in sequences]
    while size % (2 * GRADIENT_ROWS) == 0 and 2 * sum(lengths) <= size:
        size //= 2
    tokens, targets, positions, slots = (np.zeros(size, np.int32) for _ in range(4))
    scored = np.zeros(size, bool)
    most = size // GRADIENT_ROWS
    tables = np.zeros((most, -(-size // PAGE_SIZE)), np.int32)
    query_start, seq_lens = np.full(most + 1, size, np.int32), np.zeros(most, np.int32)
    if rest := size - sum(lengths):
        lengths.append(rest)
    start, page, where = 0, 1, []
    for i, length in enumerate(lengths):
        ids = np.asarray(sequences[i], np.int32) if i < len(sequences) else np.zeros(0, np.int32)
        at = np.arange(length)
        pages = page + np.arange(-(-length // PAGE_SIZE))
        tables[i, : len(pages)] = pages
        tokens[start : start + len(ids)] = ids
        targets[start : start + len(ids) - 1] = ids[1:]
        scored[start : start + len(ids) - 1] = True
        positions[start : start + length] = at
        slots[start : start + length] = pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
        query_start[i], seq_lens[i] = start, length
        if i < len(sequences):
            where.append(slice(start, start + len(ids)))
        start, page = start + length, page + len(pages)
    none = np.zeros((0, tables.shape[1]), np.int32)
    indices = none, np.zeros(0, np.int32), tables, query_start, seq_lens
    batch = Batch(tokens, positions, slots, *indices, query_alignment=GRADIENT_ROWS)
    return MicroBatch(batch, targets, scored), where
