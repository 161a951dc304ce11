"""The cases: one sequence's values computed in many ways that may not matter."""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.verify.probe import (
    HOSTILE_PAGES,
    LENGTH,
    LONG,
    MAX_SEQS,
    MAX_TOKENS,
    NEIGHBOURS,
    POOL,
    PREFILL_SEQS,
    Probe,
)
from jaxdet.verify.report import Case
from pallas_kernels.attention.segments_sm90 import SEGMENT
from pallas_kernels.numerics import PAGE_SIZE

BATCHES = (1, 2, 3, 5, 8, 16, 33, 64)
CHUNKS = (1, 7, 32, 64, 100)

USERS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "XLA_FLAGS": "--xla_allow_excess_precision=false",
}
"""Settings of a user's own that must not matter."""

SEGMENTS = {"mosaic_gpu": SEGMENT}
"""Keys in a segment of attention, where it isn't one page."""

NAMES = {
    "decode": "decode in batches of 1–64, every row",
    "ragged": "prefill in ragged batches, every slot",
    "chunks": f"prefill in chunks of {', '.join(map(str, CHUNKS[1:]))}",
    "one_by_one": "token by token",
    "several": "several decode steps in one dispatch, tokens and cache",
}
"""Cases that plain JAX goes through as well."""


def step_cases(probe: Probe) -> Iterator[Case]:
    """Cases that call the model's step directly and compare all logits with one prefill of the sequence alone."""
    yield _decode_batches(probe)
    yield _ragged_prefill(probe)
    yield _mixed(probe)
    yield _chunks(probe)
    yield _one_by_one(probe)
    yield _pages(probe)
    yield _repetition(probe)


def _decode_batches(probe: Probe) -> Case:
    """Rows take turns: this sequence at some position, or a neighbour whose context is random, NaN, inf or 1e30."""
    case = Case("I1", NAMES["decode"])
    for neighbour in NEIGHBOURS:
        _, cache = probe.whole(probe.cache(neighbour), MAX_TOKENS)
        for size, parity in itertools.product(BATCHES, (0, 1)):
            at = probe.rng.integers(0, len(probe.tokens), size)
            mine = [i for i in range(size) if size == 1 or i % 2 == parity]
            rows = [probe.me(at[i], 1) if i in mine else probe.stranger(1) for i in range(size)]
            found, cache = probe.run(cache, rows)
            for i in mine:
                case.compare(found[i], probe.reference[at[i]][None])
    return case


def _ragged_prefill(probe: Probe) -> Case:
    """The whole sequence at every slot among neighbours of 2–40 tokens with hostile contexts."""
    case = Case("I1", NAMES["ragged"])
    kinds = itertools.cycle(NEIGHBOURS)
    for slot in range(PREFILL_SEQS):
        rows = [probe.stranger(int(probe.rng.integers(2, 40))) for _ in range(PREFILL_SEQS - 1)]
        rows.insert(slot, probe.me(0, len(probe.tokens)))
        found, _ = probe.run(probe.cache(next(kinds)), rows)
        case.compare(found[slot], probe.reference)
    return case


def _mixed(probe: Probe) -> Case:
    """A chunk of this sequence in the same step as other sequences' decode tokens."""
    case = Case("I2", "a chunk beside decoding neighbours")
    cache, at = probe.cache("NaN"), 0
    while at < len(probe.tokens):
        count = min(int(probe.rng.integers(2, 90)), len(probe.tokens) - at)
        rows = [probe.stranger(1), probe.me(at, count), probe.stranger(1), probe.stranger(5)]
        found, cache = probe.run(cache, rows)
        case.compare(found[1], probe.reference[at : at + count])
        at += count
    return case


def _chunks(probe: Probe) -> Case:
    case = Case("I2", NAMES["chunks"])
    for chunk in CHUNKS[1:]:
        case.compare(probe.whole(probe.cache("NaN"), chunk)[0], probe.reference)
    return case


def _one_by_one(probe: Probe) -> Case:
    case = Case("I2", NAMES["one_by_one"])
    case.compare(probe.whole(probe.cache("inf"), 1)[0], probe.reference)
    return case


def _pages(probe: Probe) -> Case:
    """Shuffled pages anywhere in a pool whose other pages hold NaN."""
    case = Case("I3", "shuffled pages in a pool of NaN")
    free = np.arange(1, POOL - HOSTILE_PAGES)
    for _ in range(4):
        pages = probe.rng.permutation(free)[: probe.table].tolist()
        found, cache = probe.whole(probe.cache("NaN"), MAX_TOKENS, pages)
        case.compare(found, probe.reference)
        at = len(probe.tokens) - 1
        (found,), _ = probe.run(cache, [probe.me(at, 1, pages)])
        case.compare(found, probe.reference[at:])
    return case


def _repetition(probe: Probe) -> Case:
    case = Case("I4", "three times again")
    for _ in range(3):
        case.compare(probe.whole(probe.cache("random"), MAX_TOKENS)[0], probe.reference)
    return case


def long_case(step: Step, max_model_len: int) -> Iterator[Case]:
    """Where one segment of attention holds the whole reference: a sequence that has two, if the model holds it.

    In other chunks, and every token past the segment's end as a decode row beside neighbours.
    """
    if SEGMENTS.get(step.backend, PAGE_SIZE) < LENGTH or max_model_len < LONG:
        return
    case, probe = Case("I2", f"{LONG} tokens, more than a segment of attention"), Probe(step, LONG)
    for chunk in (2 * MAX_TOKENS, 100):
        found, cache = probe.whole(probe.cache("NaN"), chunk)
        case.compare(found, probe.reference)
    for first in range(SEGMENTS[step.backend] - MAX_SEQS // 2, LONG, MAX_SEQS // 2):
        positions = range(first, min(first + MAX_SEQS // 2, LONG))
        rows = [row for at in positions for row in (probe.me(at, 1), probe.stranger(1))]
        found, cache = probe.run(cache, rows)
        for at, logits in zip(positions, found[::2], strict=True):
            case.compare(logits, probe.reference[at : at + 1])
    yield case


SAMPLED = SamplingParams(
    temperature=0.8, top_p=0.9, top_k=50, seed=7, n=2, max_tokens=16, logprobs=5, ignore_eos=True
)
GREEDY = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True)
CROWDS = (33, 64)
OTHERS = (
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
    SamplingParams(temperature=1.5, min_p=0.05, seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.7, repetition_penalty=1.3, seed=2, max_tokens=14, ignore_eos=True),
    SamplingParams(
        temperature=1, presence_penalty=1, frequency_penalty=0.5, n=3, max_tokens=5, ignore_eos=True
    ),
    SamplingParams(temperature=1, logit_bias={3: 50.0, 5: -100.0}, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.3, top_p=0.2, logprobs=20, prompt_logprobs=1, max_tokens=3, ignore_eos=True),
)


def request_cases(llm: LLM, tokens: list[int]) -> Iterator[Case]:
    """Cases that go through the whole engine: a seeded request's tokens, log-probabilities and logits.

    Args:
        llm: with `keep_logits`, and room for 500 tokens.
        tokens: 150 or more, of which the prompts are made.
    """
    prompt = tokens[:150]
    (alone,) = _run(llm, [prompt], [SAMPLED])

    case = Case("I1", "other sampling parameters in the batch")
    crowd = [tokens[i : 4 + 9 * i] for i in range(len(OTHERS))]
    for place in (0, 3, len(OTHERS)):
        prompts, params = list(crowd), list(OTHERS)
        prompts.insert(place, prompt)
        params.insert(place, SAMPLED)
        _compare(case, _run(llm, prompts, params)[place], alone)
    yield case

    case = Case("I2", "prefix-cache hit")
    (again,) = _run(llm, [prompt], [SAMPLED])
    if all(sequence.cached for sequence in again):
        _compare(case, again, alone)
    yield case

    case = Case("I2", "preempted and recomputed")
    prompt = tokens[: PAGE_SIZE - 8]  # its answer needs a second page
    (alone,) = _run(llm, [prompt], [SAMPLED])
    before, pool = llm.engine.scheduler.preemptions, llm.engine.pool
    taken = [pool.allocate() for _ in range(pool.available - 3)]
    crowded = _run(llm, [prompt, tokens[1:PAGE_SIZE], prompt], [SAMPLED] * 3)
    pool.release(taken)
    if llm.engine.scheduler.preemptions > before:
        for place in (0, 2):
            _compare(case, crowded[place], alone)
    yield case

    case = Case("I2", "score against sampler")
    for sequence in alone:
        (scored,) = llm.score([sequence.tokens])
        sampled = [entry[0] for entry in sequence.logprobs]
        case.compare(np.array(scored.logprobs[len(prompt) - 1 :]), np.array(sampled))
    yield case

    case = Case("I1", f"among {' and '.join(map(str, CROWDS))} requests")
    (expected,) = _run(llm, [tokens[:40]], [GREEDY])
    for size in CROWDS:
        strangers = [tokens[i : i + 20 + i] for i in range(size)]
        place = int(size * 0.6)
        prompts = [*strangers[:place], tokens[:40], *strangers[place + 1 :]]
        _compare(case, _run(llm, prompts, [GREEDY] * size)[place], expected)
    yield case


def _run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[Sequence]]:
    """Runs requests together; per request its sequences."""
    requests = [llm.engine.add(p, s) for p, s in zip(prompts, params, strict=True)]
    while llm.engine.has_work:
        llm.engine.step()
    return requests


def _compare(case: Case, found: list[Sequence], expected: list[Sequence]) -> None:
    for one, other in zip(found, expected, strict=True):
        case.compare(np.array(one.output), np.array(other.output))
        case.compare(*(np.array([entry[0] for entry in s.logprobs]) for s in (one, other)))
        case.compare(np.stack(one.logits), np.stack(other.logits))


def restart_case(model: str, dtype: str, backend: str | None, digest: str) -> Case:
    """The reference's digest from new processes: with an empty and a filled compilation cache, and under `USERS`."""
    case = Case("I4", "new processes: compiled anew, from the cache, under other settings of JAX and XLA")
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "jaxdet.verify.restart", model, dtype, backend or ""]
        for settings in ({}, {}, USERS):
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache} | settings
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                case.note = (
                    f"the new process failed ({(done.stderr.strip().splitlines() or ['no output'])[-1]})"
                )
            found = done.stdout.split()[-1] if done.stdout.strip() else ""
            case.compare(np.array(list(found)), np.array(list(digest)))
    return case
