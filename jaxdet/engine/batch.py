"""Turns scheduled sequences into the arrays of a step, padded to a bucket."""

import numpy as np

from jaxdet.engine.sequence import Sequence
from jaxdet.models.layers import Batch
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE
from pallas_kernels.sample.op import SamplingRows

Work = list[tuple[Sequence, int]]

SMALLEST_PREFILL = 32
ADJUSTMENT_BUCKETS = (0, 32, 512, 4096, 32768, 2**19)
TINY = float(np.finfo(np.float32).tiny)


def round_up(value: int, smallest: int, largest: int) -> int:
    """The bucket of `value`: the next power of two from `smallest`, at most `largest`."""
    size = smallest
    while size < value:
        size *= 2
    return max(min(size, largest), value)


def model_batch(
    work: Work, *, max_prefill_seqs: int, max_num_seqs: int, max_tokens: int, table: int
) -> Batch:
    """Arrays of one step.

    Buckets: decode steps have 1, 2, 4, … rows; prefill steps 32, 64, … tokens and 1 or `max_prefill_seqs` sequences.

    Args:
        work: sequences with the number of their tokens to compute.
        table: length of a block table.
    """
    count = sum(n for _, n in work)
    if all(n == 1 for _, n in work):
        tokens = rows = round_up(len(work), 1, max_num_seqs)
        longest = 1
    else:
        tokens = longest = round_up(count, SMALLEST_PREFILL, max_tokens)
        rows = 1 if len(work) == 1 else max(max_prefill_seqs, len(work))
    ids, positions = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
    slots = np.full(tokens, TRASH_PAGE * PAGE_SIZE, np.int32)
    tables = np.full((rows, table), TRASH_PAGE, np.int32)
    starts, lens = np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32)
    at = 0
    for row, (sequence, n) in enumerate(work):
        end = sequence.computed + n
        where = np.arange(sequence.computed, end, dtype=np.int32)
        tables[row, : len(sequence.pages)] = sequence.pages
        ids[at : at + n] = sequence.tokens[sequence.computed : end]
        positions[at : at + n] = where
        slots[at : at + n] = tables[row, where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE
        lens[row] = end
        at += n
        starts[row + 1] = at
    starts[len(work) + 1 :] = at
    return Batch(ids, positions, slots, tables, starts, lens, longest)


def sampling_rows(work: Work, rows: int, vocab: int) -> SamplingRows:
    """The sampling parameters of a step's sequences, padded with greedy rows."""
    adjustments = [_adjustments(sequence) for sequence, _ in work]
    most = max(map(len, adjustments))
    width = next(b for b in ADJUSTMENT_BUCKETS if b >= most)
    ids = np.full((rows, width), vocab, np.int32)
    bias, seen = np.zeros((rows, width), np.float32), np.zeros((rows, width), bool)
    counts = np.zeros((rows, width), np.int32)
    for row, adjusted in enumerate(adjustments):
        for at, (token, (token_bias, token_seen, token_count)) in enumerate(adjusted.items()):
            ids[row, at], bias[row, at] = token, token_bias
            seen[row, at], counts[row, at] = token_seen, token_count

    def column(of, fill, dtype):
        values = [of(sequence) for sequence, _ in work]
        return np.asarray(values + [fill] * (rows - len(values)), dtype)

    return SamplingRows(
        temperature=column(lambda s: s.params.temperature, 0, np.float32),
        top_k=column(lambda s: s.params.top_k if s.params.temperature else 0, 0, np.int32),
        # A top_p that float32 rounds to 0 would keep nothing; the smallest normal number keeps the best token.
        top_p=column(lambda s: max(s.params.top_p, TINY) if s.params.temperature else 1, 1, np.float32),
        min_p=column(lambda s: s.params.min_p, 0, np.float32),
        seed=column(lambda s: (s.seed & 0xFFFFFFFF, s.seed >> 32), (0, 0), np.uint32),
        sample_index=column(lambda s: s.sample_index, 0, np.int32),
        position=column(lambda s: len(s.tokens), 0, np.int32),
        repetition_penalty=column(lambda s: s.params.repetition_penalty, 1, np.float32),
        presence_penalty=column(lambda s: s.params.presence_penalty, 0, np.float32),
        frequency_penalty=column(lambda s: s.params.frequency_penalty, 0, np.float32),
        adjusted_ids=ids,
        adjusted_bias=bias,
        seen=seen,
        output_counts=counts,
    )


def _adjustments(sequence: Sequence) -> dict[int, tuple[float, bool, int]]:
    """Token id → (bias, seen, count in the output), rebuilt from the tokens each time: preemption can't lose it."""
    p = sequence.params
    bias = dict(p.logit_bias)
    if sequence.num_output < p.min_tokens:
        bias |= dict.fromkeys(sequence.stop_ids, -np.inf)
    touched = set(bias)
    if p.repetition_penalty != 1:
        touched |= set(sequence.tokens)
    elif p.presence_penalty or p.frequency_penalty:
        touched |= set(sequence.counts)
    prompt = set(sequence.prompt) if p.repetition_penalty != 1 else set()
    return {
        token: (
            bias.get(token, 0.0),
            token in prompt or token in sequence.counts,
            sequence.counts.get(token, 0),
        )
        for token in sorted(touched)
    }
