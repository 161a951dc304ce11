"""One step of the model as pure, jitted functions.

The model's program depends on the step's bucket, the sampler's on the number of sequences and on what was asked for:
kept apart, their variants add up instead of multiplying, and the model is compiled once a bucket.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

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
    logits: HostOrDevice | None
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None = None


class Step:
    """A model split once into graph and state, and its compiled programs."""

    def __init__(self, model: DecoderLM):
        self.config, self.dtype, self.backend = model.config, model.dtype, model.backend
        graph, self.state = nnx.split(model)
        self._hidden = jax.jit(functools.partial(_hidden, graph), donate_argnames="cache")
        self._sample = jax.jit(functools.partial(_sample, graph), static_argnames="top")
        self._score = jax.jit(functools.partial(_score, graph), static_argnames="top")
        self._logits = jax.jit(functools.partial(_logits, graph))

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """Zeroed pages for every layer: [num_pages, Hkv, page_size, D] for keys and for values."""
        shape = (num_pages, self.config.num_kv_heads, page_size, self.config.head_dim)
        return [
            (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
            for _ in range(self.config.num_layers)
        ]

    def run(
        self,
        cache: KVCache,
        batch: Batch,
        rows: SamplingRows,
        *,
        targets: Int[HostOrDevice, " T"] | None = None,
        top_logprobs: int | None = None,
    ) -> tuple[StepOutput, KVCache]:
        """One token per sequence, and the cache with this step's keys and values in it (the old one is donated).

        Args:
            targets: score these tokens, one for each of the step's, too.
            top_logprobs: report log-probabilities, with so many of the most likely tokens beside the chosen one.
        """
        hidden, last, cache = self._hidden(self.state, cache, batch)
        out = self._sample(self.state, last, rows, top=top_logprobs)
        if targets is not None:
            scores = self._score(self.state, hidden, targets, top=top_logprobs or 0)
            out = out._replace(prompt_logprobs=scores)
        return out, cache

    def forward(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T V"], KVCache]:
        """float32 logits of every token of the step: what verification compares."""
        hidden, _, cache = self._hidden(self.state, cache, batch)
        return self._logits(self.state, hidden), cache


def _hidden(graph, state, cache: KVCache, batch: Batch) -> tuple[jax.Array, jax.Array, KVCache]:
    """Normalised hidden states of every token and of each sequence's last one."""
    hidden, cache = nnx.merge(graph, state)(batch, cache)
    last = jnp.maximum(batch.query_start[1:] - 1, 0)
    return hidden, hidden.at[last].get(mode="promise_in_bounds"), cache


def _logits(graph, state, hidden) -> jax.Array:
    return nnx.merge(graph, state).logits(hidden)


def _sample(graph, state, hidden, rows: SamplingRows, *, top: int | None) -> StepOutput:
    model = nnx.merge(graph, state)
    logits = model.logits(hidden)
    tokens, usable = sample(logits, rows, backend=model.backend)
    logprobs = None
    if top is not None:
        logprobs = Logprobs(*token_logprobs(logits, tokens, top=top, backend=model.backend))
    return StepOutput(tokens, usable, logits, logprobs)


def _score(graph, state, hidden, targets, *, top: int) -> Logprobs:
    """Logprobs of `targets` at every row, a block of rows at a time."""
    model = nnx.merge(graph, state)
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
