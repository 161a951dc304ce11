"""Turns a plan into the arrays of a step, padded to a bucket."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.models.layers import Batch
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE
from pallas_kernels.sample.op import Adjustments, SamplingRows

TINY = float(np.finfo(np.float32).tiny)
KNOWN = -1
"""In place of a slot: the host knows the token."""
ADJUSTMENT_BUCKETS = (256, 16384, 2**20)


class Choice(NamedTuple):
    """A token that the step chooses from a row of logits."""

    sequence: Sequence
    drafts: list[int]
    """Guesses between the sequence's tokens and this one."""
    position: int
    row: int


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

    counts = np.asarray([part.count for part in plan.rows], np.int32)
    firsts, used = np.cumsum(counts) - counts, int(counts.sum())
    for first, part in zip(firsts.tolist(), plan.rows, strict=True):
        tables[first : first + part.count, : len(part.sequence.pages)] = part.sequence.pages
    starts = np.asarray([part.start for part in plan.rows], np.int32)
    positions[:used] = np.arange(used) + np.repeat(starts - firsts, counts)
    lens[:used] = positions[:used] + 1
    at = rows
    for index, part in enumerate(plan.chunks):
        end = part.start + part.count
        tables[rows + index, : len(part.sequence.pages)] = part.sequence.pages
        positions[at : at + part.count] = np.arange(part.start, end)
        at += part.count
        lens[rows + index], query_start[index + 1] = end, at - rows
    query_start[len(plan.chunks) + 1 :] = at - rows

    owners = np.repeat(np.arange(len(plan.chunks)), np.asarray([part.count for part in plan.chunks], int))
    for begin, owner, parts in ((0, np.arange(used), plan.rows), (rows, rows + owners, plan.chunks)):
        here = slice(begin, begin + len(owner))
        where = positions[here]
        slots[here] = tables[owner, where // PAGE_SIZE] * PAGE_SIZE + where % PAGE_SIZE
        tokens = [_tokens(part) for part in parts]
        ids[here] = [token for known in tokens for token, _ in known]
        feed[here] = [slot for known in tokens for _, slot in known]
    return Batch(
        ids, positions, slots, tables[:rows], lens[:rows], tables[rows:], query_start, lens[rows:]
    ), feed


def _tokens(part: Part) -> list[tuple[int, int]]:
    """(token, KNOWN), or (0, slot) for the one that is still on the device."""
    s = part.sequence
    known = [*s.tokens[part.start : part.start + part.count], *part.drafts]
    return [(token, KNOWN) for token in known] + [(0, s.slot)] * (part.count - len(known))


def choices(plan: Plan, bucket: Bucket) -> list[Choice]:
    """The tokens that the step chooses."""
    found = []
    for part in plan.rows:
        for ahead in range(part.count):
            position = part.start + ahead + 1
            found.append(Choice(part.sequence, part.drafts[:ahead], position, len(found)))
    for row, part in enumerate(plan.chunks, bucket.rows):
        if part.samples:
            found.append(Choice(part.sequence, [], part.start + part.count, row))
    return found


def sampling_rows(chosen: list[Choice], rows: int) -> SamplingRows | None:
    """The sampling parameters of a step's rows of logits; None if all are greedy."""
    if not any(choice.sequence.params.temperature for choice in chosen):
        return None
    at = np.asarray([choice.row for choice in chosen])

    def column(values, fill, dtype):
        found = np.full((rows, *np.shape(fill)), fill, dtype)
        found[at] = values
        return found

    sequences = [choice.sequence for choice in chosen]
    params = [sequence.params for sequence in sequences]
    return SamplingRows(
        temperature=column([p.temperature for p in params], 0, np.float32),
        top_k=column([p.top_k if p.temperature else 0 for p in params], 0, np.int32),
        # A top_p that float32 rounds to 0 would keep nothing; the smallest normal number keeps the best token.
        top_p=column([max(p.top_p, TINY) if p.temperature else 1 for p in params], 1, np.float32),
        min_p=column([p.min_p for p in params], 0, np.float32),
        seed=column([(s.seed & 0xFFFFFFFF, s.seed >> 32) for s in sequences], (0, 0), np.uint32),
        sample_index=column([s.sample_index for s in sequences], 0, np.int32),
        position=column([choice.position for choice in chosen], 0, np.int32),
    )


def adjustments(chosen: list[Choice], rows: int, vocab: int) -> Adjustments | None:
    """Biases, bans and penalties of a step's rows of logits; None if there are none."""
    entries = [(choice.row, *entry) for choice in chosen for entry in _adjusted(choice)]
    if not entries:
        return None
    size = next((bucket for bucket in ADJUSTMENT_BUCKETS if bucket >= len(entries)), len(entries))
    entries += [(rows, vocab, 0, False, 0, 1, 0, 0)] * (size - len(entries))
    kinds = (np.int32, np.int32, np.float32, bool, np.int32, np.float32, np.float32, np.float32)
    columns = zip(*entries, strict=True)
    return Adjustments(*(np.asarray(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def _adjusted(choice: Choice) -> list[tuple[int, float, bool, int, float, float, float]]:
    """Entries of one row, rebuilt from the tokens each time: preemption and wrong guesses leave nothing behind."""
    sequence, p = choice.sequence, choice.sequence.params
    bias = dict(p.logit_bias)
    if choice.position - len(sequence.prompt) < p.min_tokens:
        bias |= dict.fromkeys(sequence.stop_ids, -np.inf)
    touched = set(bias)
    counts = sequence.counts
    if sequence.needs_last_token:
        if choice.drafts:
            counts = Counter(counts)
            counts.update(choice.drafts)
        touched |= set(counts)
        if p.repetition_penalty != 1:
            touched |= set(sequence.prompt)
    if not touched:
        return []
    prompt = set(sequence.prompt) if p.repetition_penalty != 1 else set()
    penalties = p.repetition_penalty, p.presence_penalty, p.frequency_penalty
    return [
        (token, bias.get(token, 0.0), token in prompt or token in counts, counts.get(token, 0), *penalties)
        for token in touched
    ]


def slots_of(chosen: list[Choice], rows: int, nowhere: int) -> np.ndarray:
    """Where the device notes each row's token; guesses and padding go nowhere."""
    found = np.full(rows, nowhere, np.int32)
    for choice in chosen:
        if not choice.drafts:
            found[choice.row] = choice.sequence.slot
    return found


def targets(plan: Plan, bucket: Bucket) -> np.ndarray:
    """The known token after each of a step's tokens, 0 where there is none: what `prompt_logprobs` ask about."""
    found = np.zeros(bucket.rows + bucket.tokens, np.int32)
    for part, at in starts(plan, bucket):
        following = part.sequence.tokens[part.start + 1 : part.start + part.count + 1]
        found[at : at + len(following)] = following
    return found


def starts(plan: Plan, bucket: Bucket) -> list[tuple[Part, int]]:
    """Every part with the row of its first token."""
    found = []
    for parts, at in ((plan.rows, 0), (plan.chunks, bucket.rows)):
        for part in parts:
            found.append((part, at))
            at += part.count
    return found


def sampled_parts(plan: Plan, bucket: Bucket) -> list[tuple[Part, int]]:
    """Every part after which a token is chosen, with its first row of logits."""
    rows = [pair for pair in starts(plan, bucket) if pair[1] < bucket.rows]
    return rows + [(part, row) for row, part in enumerate(plan.chunks, bucket.rows) if part.samples]
