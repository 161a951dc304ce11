"""The case of several decode steps in one dispatch: another program, beside the one that takes them one by one."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdet.engine.batch import model_batch, sampled, sampling_rows, slots_of, steps_of
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.models.layers import KVCache
from jaxdet.sampling_params import SamplingParams
from jaxdet.verify.cases import NAMES
from jaxdet.verify.probe import BUCKETS, NEIGHBOURS, Probe, Row, sequence_of
from jaxdet.verify.report import Case
from pallas_kernels.numerics import PAGE_SIZE

STEPS = 4
"""Of one dispatch."""
GREEDY, DRAWN = SamplingParams(temperature=0), SamplingParams(temperature=1, seed=7)
WORK = ((1, 8, DRAWN), (60, 3, GREEDY), (126, 8, GREEDY), (127, 8, DRAWN), (255, 6, DRAWN), (380, 8, DRAWN))
"""Per sequence its length, how many tokens it samples and how: some end in the midst of the first or second dispatch,
some come to another page there."""
STRANGERS = (5, 7)
"""How many tokens each neighbour samples."""


def several_steps_case(probe: Probe) -> Case:
    """Tokens and the cache's bytes: each sequence alone and step by step, then several steps at a time.

    All of them beside neighbours whose contexts are random, NaN, inf or 1e30; and the greedy ones alone, which is
    another program.
    """
    case = Case("I2", NAMES["several"])
    mine, at = [], 1
    for length, count, params in WORK:
        pages = list(range(at, at := at + -(-(length + count) // PAGE_SIZE)))
        mine.append(sequence_of(Row(probe.tokens, 0, length, pages), params, count))
    own = np.arange(1, at)
    # Past the prompts their pages hold NaN: no step may read beyond its token, and none may write there.
    prompts = [Row(s.prompt, 0, len(s.prompt) - 1, s.pages) for s in mine if len(s.prompt) > 1]
    _, cache = probe.run(probe.cache("NaN"), prompts)
    context = jax.tree.map(lambda pages: pages[own], cache)

    def prefilled(neighbour: str = "NaN") -> KVCache:
        return jax.tree.map(lambda x, mine: x.at[own].set(mine), probe.cache(neighbour), context)

    expected, cache = {}, prefilled()
    for sequence in mine:
        (expected[sequence],), cache = _decode(probe, cache, [sequence], 1)
    contents = {sequence: _contents(cache, sequence) for sequence in mine}

    def compare(sequence: Sequence, tokens: np.ndarray, cache: KVCache) -> None:
        case.compare(tokens, expected[sequence])
        for found, wanted in zip(_contents(cache, sequence), contents[sequence], strict=True):
            case.compare(found, wanted)

    for neighbour in NEIGHBOURS:
        everyone = [*mine, *(sequence_of(probe.stranger(1), DRAWN, count) for count in STRANGERS)]
        probe.rng.shuffle(everyone)
        tokens, cache = _decode(probe, prefilled(neighbour), everyone, STEPS)
        for sequence, found in zip(everyone, tokens, strict=True):
            if sequence in expected:
                compare(sequence, found, cache)
    cache = prefilled()
    for sequence in mine:
        if sequence.params is GREEDY:
            (tokens,), cache = _decode(probe, cache, [sequence], STEPS)
            compare(sequence, tokens, cache)
    return case


def _contents(cache: KVCache, sequence: Sequence) -> list[np.ndarray]:
    """Every layer's keys and values in the sequence's pages."""
    return [np.asarray(x[np.asarray(sequence.pages)]) for layer in cache for x in layer]


def _decode(
    probe: Probe, cache: KVCache, sequences: list[Sequence], steps: int
) -> tuple[list[np.ndarray], KVCache]:
    """Runs sequences beside each other, `steps` a dispatch; the tokens that each sampled, and the cache (donated)."""
    last_tokens = jnp.zeros(len(sequences), jnp.int32)
    drawn: list[list[np.ndarray]] = [[] for _ in sequences]
    for slot, sequence in enumerate(sequences):
        sequence.slot = slot
    for done in range(0, max(s.max_tokens for s in sequences), steps):
        running = [s for s in sequences if s.max_tokens > done]
        parts = [
            Part(s, len(s.prompt) - 1 + done, 1, [], True, min(steps, s.max_tokens - done)) for s in running
        ]
        tokens, last_tokens, cache = _dispatch(probe, cache, last_tokens, Plan(parts, steps=steps))
        for row, part in enumerate(parts):
            drawn[part.sequence.slot].append(tokens[: part.steps, row])
    return [np.concatenate(tokens) for tokens in drawn], cache


def _dispatch(
    probe: Probe, cache: KVCache, last_tokens: jax.Array, plan: Plan
) -> tuple[np.ndarray, jax.Array, KVCache]:
    """What the engine hands to the device; a token that the host doesn't know is found in its sequence's slot.

    Returns:
        Tokens [steps, rows], −1 where the logits were unusable; every slot's last token; the cache.
    """
    step, bucket = probe.step, BUCKETS.fit(len(plan.rows), 0, 0)
    batch, feed = model_batch(plan, bucket, probe.table)
    chosen = sampled(plan, bucket)
    rows, slots = sampling_rows(chosen, bucket.rows), slots_of(chosen, bucket.rows, len(last_tokens))
    if plan.steps > 1:
        counts = steps_of(plan, bucket)
        tokens, usable, last_tokens, cache = step.decode(
            cache, last_tokens, feed, batch, counts, rows, slots, steps=plan.steps
        )
    else:
        _, logits, cache = step.run(cache, last_tokens, feed, batch)
        tokens, usable, last_tokens = step.draw(logits, rows, slots, last_tokens)
    found = np.where(np.asarray(usable), np.asarray(tokens), -1)
    return found.reshape(plan.steps, -1), last_tokens, cache
