"""The negative control: the same cases through plain jitted JAX, which is free to fail them."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdet.baseline import Baseline
from jaxdet.verify.cases import BATCHES, CHUNKS, NAMES
from jaxdet.verify.probe import PREFILL_SEQS
from jaxdet.verify.report import Case
from jaxdet.verify.several_steps import STEPS

CONTEXT = 64
"""Tokens before the decoded one: enough to differ, few enough for 64 rows at once."""
PROMPT = 20
"""Tokens of a short prompt: its rows alone are few, with seven neighbours many."""


def control_cases(plain: Baseline, tokens: list[int], seed: int = 0) -> Iterator[Case]:
    """Each case compares with the sequence alone; neighbours are random sequences, no hostile contents needed."""
    rng = np.random.default_rng(seed)
    whole = plain.logits(tokens)
    vocab = plain.config.vocab_size

    case = Case("I1", NAMES["decode"])
    expected = None
    for size in BATCHES:
        batch = rng.integers(0, vocab, (size, CONTEXT + 1)).astype(np.int32)
        batch[::2] = tokens[: CONTEXT + 1]
        start = np.zeros(size, np.int32)
        _, cache = plain.forward(plain.params, plain.new_cache(size), batch[:, :-1], start, start)
        logits, _ = plain.forward(plain.params, cache, batch[:, -1:], start + CONTEXT)
        mine = np.asarray(logits)[::2, 0]
        expected = mine[0] if expected is None else expected
        case.compare(mine, np.broadcast_to(expected, mine.shape))
    yield case

    case = Case("I1", NAMES["ragged"])
    expected = plain.logits(tokens[:PROMPT])
    batch = rng.integers(0, vocab, (PREFILL_SEQS, PROMPT)).astype(np.int32)
    batch[3] = tokens[:PROMPT]
    start = np.zeros(PREFILL_SEQS, np.int32)
    logits, _ = plain.forward(plain.params, plain.new_cache(PREFILL_SEQS), batch, start, every=True)
    case.compare(np.asarray(logits)[3], expected)
    yield case

    case = Case("I2", NAMES["chunks"])
    for chunk in CHUNKS[1:]:
        case.compare(plain.logits(tokens, chunk=chunk), whole)
    yield case

    case = Case("I2", NAMES["one_by_one"])
    case.compare(plain.logits(tokens, chunk=1), whole)
    yield case

    case = Case("I2", NAMES["several"])
    (expected,) = _continued(plain, np.array([tokens[: CONTEXT + 1]], np.int32), at_once=False)
    batch = rng.integers(0, vocab, (PREFILL_SEQS, CONTEXT + 1)).astype(np.int32)
    batch[::2] = tokens[: CONTEXT + 1]
    for mine in _continued(plain, batch, at_once=True)[::2]:
        for found, wanted in zip(mine, expected, strict=True):
            case.compare(found, wanted)
    yield case


def _continued(plain: Baseline, batch: np.ndarray, *, at_once: bool) -> list[list[np.ndarray]]:
    """Per sequence the STEPS greedy tokens after it, and each layer's keys and values from there on."""
    start = np.zeros(len(batch), np.int32)
    _, cache = plain.forward(plain.params, plain.new_cache(len(batch)), batch[:, :-1], start, start)

    def one(params, step, state):
        tokens, cache = state
        logits, cache = plain.forward(params, cache, tokens[step][:, None], start + CONTEXT + step)
        return tokens.at[step + 1].set(jnp.argmax(logits[:, 0], 1).astype(jnp.int32)), cache

    state = jnp.zeros((STEPS + 1, len(batch)), jnp.int32).at[0].set(batch[:, -1]), cache
    if at_once:
        loop = jax.jit(lambda params, state: lax.fori_loop(0, STEPS, functools.partial(one, params), state))
        tokens, cache = loop(plain.params, state)
    else:
        for step in range(STEPS):
            state = one(plain.params, step, state)
        tokens, cache = state
    arrays = [tokens.T, *(x[:, CONTEXT : CONTEXT + STEPS] for layer in cache for x in layer)]
    return [[np.asarray(x[i]) for x in arrays] for i in range(len(batch))]
