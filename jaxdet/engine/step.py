"""One step of the model as a pure, jitted function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxdet.models.layers import Batch, DecoderLM, KVCache
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.sample.op import SamplingRows, sample, token_logprobs

SCORE_ROWS = 64
"""Rows of logits alive at once while every position is scored."""


class Logprobs(NamedTuple):
    """What `token_logprobs` returns: of a token, its rank, and of the most likely ones."""

    logprob: HostOrDevice
    rank: HostOrDevice
    top: HostOrDevice
    top_ids: HostOrDevice


class StepOutput(NamedTuple):
    """Per sequence the sampled token and whether its logits were usable; the rest when asked for."""

    tokens: HostOrDevice
    usable: HostOrDevice
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None
    logits: HostOrDevice | None


class Step:
    """A model split once into graph and state; `run` recompiles for each new bucket and each new flag only."""

    def __init__(self, model: DecoderLM):
        self.config, self.dtype, self.backend = model.config, model.dtype, model.backend
        graph, self.state = nnx.split(model)
        self.run = jax.jit(
            functools.partial(_step, graph),
            static_argnames=("top_logprobs", "keep_logits"),
            donate_argnames=("cache",),
        )
        self.forward = jax.jit(functools.partial(_forward, graph), donate_argnames=("cache",))

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """Zeroed pages for every layer: [num_pages, Hkv, page_size, D] for keys and for values."""
        shape = (num_pages, self.config.num_kv_heads, page_size, self.config.head_dim)
        return [
            (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
            for _ in range(self.config.num_layers)
        ]


def _step(
    graph,
    state,
    cache: KVCache,
    batch: Batch,
    rows: SamplingRows,
    targets: jax.Array | None,
    *,
    top_logprobs: int | None,
    keep_logits: bool,
) -> tuple[StepOutput, KVCache]:
    model = nnx.merge(graph, state)
    hidden, cache = model(batch, cache)
    last = jnp.maximum(batch.query_start[1:] - 1, 0)
    logits = model.logits(hidden.at[last].get(mode="promise_in_bounds"))
    tokens, usable = sample(logits, rows, backend=model.backend)
    logprobs = prompt_logprobs = None
    if top_logprobs is not None:
        logprobs = Logprobs(*token_logprobs(logits, tokens, top=top_logprobs, backend=model.backend))
    if targets is not None:
        prompt_logprobs = _score(model, hidden, targets, top_logprobs or 0)
    return StepOutput(tokens, usable, logprobs, prompt_logprobs, logits if keep_logits else None), cache


def _score(model: DecoderLM, hidden, targets, top: int) -> Logprobs:
    """Logprobs of `targets` at every row, a block of rows at a time."""
    count = hidden.shape[0]
    blocks = -(-count // SCORE_ROWS)
    pad = blocks * SCORE_ROWS - count
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(blocks, SCORE_ROWS, -1)
    targets = jnp.pad(targets, (0, pad)).reshape(blocks, SCORE_ROWS)

    def block(operands):
        return Logprobs(
            *token_logprobs(model.logits(operands[0]), operands[1], top=top, backend=model.backend)
        )

    scored = lax.map(block, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(blocks * SCORE_ROWS, *x.shape[2:])[:count], scored)


def _forward(graph, state, cache: KVCache, batch: Batch) -> tuple[jax.Array, KVCache]:
    """float32 logits of every token of the step: what verification compares."""
    model = nnx.merge(graph, state)
    hidden, cache = model(batch, cache)
    return model.logits(hidden), cache
