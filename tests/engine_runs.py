"""Tiny models in engines that share compiled programs, requests of many kinds, and what must not change by a bit."""

import copy
import functools
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.drafting import ModelDrafter
from jaxdet.engine.engine import Engine
from jaxdet.engine.step import Step
from jaxdet.models.layers import DecoderLM
from jaxdet.models.registry import build_model
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import VOCAB_SIZE, write_tiny_model

MAX_LEN, PAGES, EOS = 384, 33, 256
DEFAULTS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": MAX_LEN, "num_pages": PAGES}


class Request(NamedTuple):
    prompt: list[int]
    params: SamplingParams


class Answer(NamedTuple):
    """What must not change by a bit."""

    tokens: np.ndarray
    logits: np.ndarray
    logprobs: np.ndarray
    finish_reason: str | None


@functools.cache
def model_of(family="llama", dtype=jnp.float32, **config) -> DecoderLM:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_tiny_model(f"{folder}/{family}", family, **config))
        return build_model(checkpoint, checkpoint.config, dtype=dtype, backend="xla", max_model_len=2048)


@functools.cache
def compiled(model) -> Step:
    """One set of compiled programs for all engines of a model, and for models that differ in their weights alone."""
    step = Step(model)
    step._programs = _programs(model.config, model.dtype)
    return step


@functools.cache
def _programs(config, dtype) -> dict:
    return {}


def with_flipped_weight(step: Step) -> Step:
    """A twin whose first weight matrix has the other lowest bits; for negative controls, in float32."""
    step = copy.copy(step)
    leaves, tree = jax.tree.flatten(step.state)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(step.state)]
    place = next(i for i, name in enumerate(names) if "qkv" in name and leaves[i].ndim > 1)
    flipped = jax.lax.bitcast_convert_type(leaves[place], jnp.uint32) ^ 1
    leaves[place] = jax.lax.bitcast_convert_type(flipped, jnp.float32)
    step.state = jax.tree.unflatten(tree, leaves)
    return step


def new_engine(model, **changes) -> Engine:
    engine = Engine(model, salt="", eos_token_ids=[EOS], keep_logits=True, **(DEFAULTS | changes))
    engine.step_fn = compiled(model)
    if isinstance(engine._drafter, ModelDrafter):
        engine._drafter._step = compiled(changes["drafter"])
    return engine


def tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


def params(seed: int, **fields) -> SamplingParams:
    """Of many kinds; all report logprobs and have a bias, so that one set of programs serves most tests."""
    kinds = (
        {"temperature": 0},
        {"temperature": 0.8, "seed": seed},
        {"temperature": 1.3, "top_p": 0.7, "seed": 2**40 + seed},
        {"temperature": 1.0, "top_k": 7, "min_p": 0.02},
        {"temperature": 0.9, "frequency_penalty": 0.8, "presence_penalty": 0.3, "seed": seed},
        {"temperature": 0.7, "logit_bias": {97: 3.0, 98: -100.0}, "ignore_eos": True},
    )
    shared = {"max_tokens": 5 + seed % 7, "logprobs": 3, "logit_bias": {97: 0.5}}
    return SamplingParams(**(shared | kinds[seed % len(kinds)] | fields))


REQUESTS = [
    Request(tokens(i, length), params(i))
    for i, length in enumerate((1, 3, 31, 40, 100, 122, 127, 128, 129, 150, 255, 260))
]


def answer(sequence) -> Answer:
    count = sequence.num_output
    logits = np.stack(sequence.logits) if count else np.zeros((0, VOCAB_SIZE), np.float32)
    logprobs = np.array([e[0] for e in sequence.logprobs], np.float32)
    return Answer(np.array(sequence.output, np.int64), logits, logprobs, sequence.finish_reason)


def run(engine, requests) -> list[list[Answer]]:
    """All requests at once; the answers of each. No page may be lost."""
    queued = [engine.add(*request) for request in requests]
    finish(engine)
    return [[answer(s) for s in sequences] for sequences in queued]


def finish(engine) -> None:
    while engine.has_work:
        engine.step()
    assert engine.pool.available == engine.pool.num_pages - 1


@functools.cache
def _alone(model, index: int) -> list[Answer]:
    return run(new_engine(model), [REQUESTS[index]])[0]


def alone(model, indices=None) -> list[list[Answer]]:
    """Each request in a fresh engine of its own."""
    return [_alone(model, i) for i in (range(len(REQUESTS)) if indices is None else indices)]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")


def differing(found: list[list[Answer]], expected: list[list[Answer]]) -> int:
    """How many values differ in their bits."""
    count = 0
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            count += a.finish_reason != b.finish_reason
            for x, y in zip(a[:3], b[:3], strict=True):
                count += x.size if x.shape != y.shape else np.count_nonzero(bits(x) != bits(y))
    return int(count)


def fill_cache(engine, value: float, pages=slice(None)) -> None:
    engine._cache = [tuple(x.at[pages].set(value) for x in layer) for layer in engine._cache]
