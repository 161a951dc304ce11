"""Turns a plan into the arrays of a step, padded to a bucket."""

from collections import Counter

import numpy as np

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.models.layers import Batch
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE
from pallas_kernels.sample.op import Adjustments, SamplingRows

KNOWN = -1
"""In place of a slot: the host knows the token."""
ADJUSTMENT_BUCKETS = (256, 16384, 2**20)

Placed = list[tuple[Part, int]]
"""Parts with a row each."""


def model_batch(plan: Plan, bucket: Bucket, table: int) -> tuple[Batch, np.ndarray]:
    """The model's arrays, and per token the slot that holds it on the device, or KNOWN.

    Args:
        table: length of a block table.
    """
    total, rows, seqs = bucket.rows + bucket.tokens, bucket.rows, bucket.seqs
    ids, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
    feed, slots = np.full(total, KNOWN, np.int32), np.full(total, TRASH_PAGE * PAGE_SIZE, np.int32)
    tables = np.full((rows + seqs, table), TRASH_PAGE, np.int32)
    lens, query_start = np.zeros(rows + seqs, np.int32), np.zeros(seqs + 1, np.int32)

    tokens: list[int] = []
    fed: list[int] = []
    where: list[int] = []
    for part in plan.rows:
        sequence, start, at = part.sequence, part.start, len(tokens)
        if part.drafts:
            tokens += [sequence.tokens[start], *part.drafts]
            fed += [KNOWN] * part.count
            where += range(start, start + part.count)
            tables[at : at + part.count, : len(sequence.pages)] = sequence.pages
            continue
        known = start < len(sequence.tokens)
        tokens.append(sequence.tokens[start] if known else 0)
        fed.append(KNOWN if known else sequence.slot)
        where.append(start)
        tables[at, : len(sequence.pages)] = sequence.pages
    used = len(tokens)
    ids[:used], feed[:used], positions[:used] = tokens, fed, where
    lens[:used] = positions[:used] + 1
    owner = np.zeros(total, np.int32)
    owner[:used] = np.arange(used)
    at = rows
    for row, part in enumerate(plan.chunks, rows):
        end, here = part.start + part.count, slice(at, at + part.count)
        tables[row, : len(part.sequence.pages)] = part.sequence.pages
        ids[here], positions[here] = part.sequence.tokens[part.start : end], np.arange(part.start, end)
        owner[here], lens[row] = row, end
        at += part.count
        query_start[row - rows + 1] = at - rows
    query_start[len(plan.chunks) + 1 :] = at - rows
    for real in (slice(0, used), slice(rows, at)):
        page, offset = positions[real] // PAGE_SIZE, positions[real] % PAGE_SIZE
        slots[real] = tables[owner[real], page] * PAGE_SIZE + offset
    row_arrays = tables[:rows], lens[:rows]
    return Batch(ids, positions, slots, *row_arrays, tables[rows:], query_start, lens[rows:]), feed


def steps_of(plan: Plan, bucket: Bucket) -> np.ndarray:
    """How many tokens each row samples in several steps in a row; padding none."""
    found = np.zeros(bucket.rows, np.int32)
    found[: len(plan.rows)] = [part.steps for part in plan.rows]
    return found


def placed(plan: Plan, bucket: Bucket) -> Placed:
    """Every part with the row of its first token."""
    return _in_a_row(plan.rows, 0) + _in_a_row(plan.chunks, bucket.rows)


def sampled(plan: Plan, bucket: Bucket) -> Placed:
    """Every part after which a token is chosen, with its first row of logits."""
    chunks = [(part, row) for row, part in enumerate(plan.chunks, bucket.rows) if part.samples]
    return _in_a_row(plan.rows, 0) + chunks


def _in_a_row(parts: list[Part], at: int) -> Placed:
    found = []
    for part in parts:
        found.append((part, at))
        at += part.count
    return found


def sampling_rows(chosen: Placed, rows: int) -> SamplingRows | None:
    """The sampling parameters of a step's rows of logits; None if all are greedy."""
    if not any(part.sequence.sampling[0] for part, _ in chosen):
        return None
    at, values, positions = [], [], []
    for part, row in chosen:
        first = part.start + part.count - len(part.drafts)
        for ahead in range(1 + len(part.drafts)):
            at.append(row + ahead)
            values.append(part.sequence.sampling)
            positions.append(first + ahead)
    table = np.tile([0.0, 0, 1, 0, 0, 0, 0], (rows, 1))
    table[at] = values
    position = np.zeros(rows, np.int32)
    position[at] = positions
    return SamplingRows(
        temperature=table[:, 0].astype(np.float32),
        top_k=table[:, 1].astype(np.int32),
        top_p=table[:, 2].astype(np.float32),
        min_p=table[:, 3].astype(np.float32),
        seed=table[:, 4:6].astype(np.uint32),
        sample_index=table[:, 6].astype(np.int32),
        position=position,
    )


def adjustments(chosen: Placed, rows: int, vocab: int) -> list[Adjustments]:
    """Biases, bans and penalties of a step's rows of logits, one after the other: no program takes more at once."""
    entries = [
        (row + ahead, *entry)
        for part, row in chosen
        if part.sequence.adjusted
        for ahead in range(1 + len(part.drafts))
        for entry in _adjusted(part, part.drafts[:ahead])
    ]
    most = ADJUSTMENT_BUCKETS[-1]
    return [_padded(entries[at : at + most], rows, vocab) for at in range(0, len(entries), most)]


def _padded(entries: list[tuple], rows: int, vocab: int) -> Adjustments:
    size = next(bucket for bucket in ADJUSTMENT_BUCKETS if bucket >= len(entries))
    entries = entries + [(rows, vocab, 0, False, 0, 1, 0, 0)] * (size - len(entries))
    kinds = (np.int32, np.int32, np.float32, bool, np.int32, np.float32, np.float32, np.float32)
    columns = zip(*entries, strict=True)
    return Adjustments(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def _adjusted(part: Part, drafts: list[int]) -> list[tuple[int, float, bool, int, float, float, float]]:
    """Entries of one row, rebuilt from the tokens each time: preemption and wrong guesses leave nothing behind."""
    sequence, p = part.sequence, part.sequence.params
    position = part.start + part.count - len(part.drafts) + len(drafts)
    bias = dict(p.logit_bias)
    if position - len(sequence.prompt) < p.min_tokens:
        bias |= dict.fromkeys(sequence.stop_ids, -np.inf)
    touched = set(bias)
    prompt = set(sequence.prompt) if p.repetition_penalty != 1 else set()
    counts = sequence.counts
    if sequence.penalised:
        if drafts:
            counts = Counter(counts)
            counts.update(drafts)
        touched |= prompt | set(counts)
    penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
    return [
        (token, bias.get(token, 0.0), token in prompt or token in counts, counts.get(token, 0), *penalties)
        for token in touched
    ]


def allowed_tokens(chosen: Placed, rows: int, vocab: int) -> np.ndarray | None:
    """Bits of the tokens that each of a step's rows of logits may choose; None if none is constrained."""
    constrained = [
        (part.sequence, constraint, part.drafts, row)
        for part, row in chosen
        if (constraint := part.sequence.constraint) is not None
    ]
    if not constrained:
        return None
    found = np.full((rows, -(-vocab // 32)), 0xFFFFFFFF, np.uint32)
    for sequence, constraint, drafts, row in constrained:
        for ahead in range(1 + len(drafts)):
            bits = found[row + ahead]
            if (allowed := sequence.ask(constraint.allowed, drafts[:ahead])) is None:
                break
            bits[:] = allowed
            if ahead < len(drafts):
                guess = drafts[ahead]
                if not bits[guess // 32] >> guess % 32 & 1:  # can't be chosen: nobody sees the rows after it
                    break
    return found


def slots_of(chosen: Placed, rows: int, nowhere: int) -> np.ndarray:
    """Where the device notes each row's token; padding and the rows of guesses go nowhere."""
    found = np.full(rows, nowhere, np.int32)
    at = [row for part, row in chosen if not part.drafts]
    found[at] = [part.sequence.slot for part, _ in chosen if not part.drafts]
    return found


def targets(plan: Plan, bucket: Bucket) -> np.ndarray:
    """The known token after each of a step's tokens, 0 where there is none: what `prompt_logprobs` ask about."""
    found = np.zeros(bucket.rows + bucket.tokens, np.int32)
    for part, at in placed(plan, bucket):
        following = part.sequence.tokens[part.start + 1 : part.start + part.count + 1]
        found[at : at + len(following)] = following
    return found
