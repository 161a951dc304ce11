"""The programs of a step. Each is compiled once for each shape, and counted.

What the model runs depends on the step's bucket, what follows it on the number of sampled rows and on what was asked
for: kept apart, their variants add up instead of multiplying.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from jaxdet.models.layers import Batch, DecoderLM, KVCache, new_cache
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.rows import over_rows
from pallas_kernels.sample.op import Adjustments, SamplingRows, adjust, restrict, sample, token_logprobs

SCORE_ROWS = 64
"""Rows of logits alive at once while every position is scored."""


class Logprobs(NamedTuple):
    """What `token_logprobs` returns: of a token, its rank, and of the most likely ones."""

    logprob: HostOrDevice
    rank: HostOrDevice
    top: HostOrDevice
    top_ids: HostOrDevice


class StepOutput(NamedTuple):
    """Per row of logits the sampled token and whether the logits were usable; the rest when asked for."""

    tokens: HostOrDevice
    usable: HostOrDevice
    logits: HostOrDevice | None
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None
    """Per token of the step."""


class Step:
    """A model's compiled programs. Every method is a pure function; donated arguments are named."""

    def __init__(self, model: DecoderLM):
        self.config, self.dtype, self.backend = model.config, model.dtype, model.backend
        graph, self.state = nnx.split(model)
        backend = self.backend
        bind = functools.partial
        self._functions = {
            "model": jax.jit(bind(_model, graph, self._tree), donate_argnums=1),
            "logits": jax.jit(bind(_logits, graph, self._tree)),
            "draw": jax.jit(bind(_draw, backend), donate_argnums=3),
            "adjust": jax.jit(adjust),
            "restrict": jax.jit(restrict),
            "logprobs": jax.jit(bind(_logprobs, backend), static_argnames="top"),
            "score": jax.jit(bind(_score, graph, self._tree), static_argnames="top"),
            "copy": jax.jit(_copy_pages, donate_argnums=0),
        }
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    @property
    def state(self) -> nnx.State:
        """The weights. They are kept flat: flattening an nnx.State takes a millisecond a step."""
        return jax.tree.unflatten(self._tree, self._weights)

    @state.setter
    def state(self, state: nnx.State) -> None:
        self._weights, self._tree = jax.tree.flatten(state)

    def new_cache(self, num_pages: int, page_size: int) -> KVCache:
        """Zeroed pages for every layer: [num_pages, Hkv, page_size, D] for keys and for values."""
        return new_cache(self.config, self.dtype, num_pages, page_size)

    def run(
        self,
        cache: KVCache,
        last_tokens: Int[Array, " slots"],
        feed: Int[HostOrDevice, " T"],
        batch: Batch,
    ) -> tuple[Float[Array, "T H"], Float[Array, "R V"], KVCache]:
        """The model over one step's tokens; the cache is donated.

        Args:
            last_tokens: the token that was sampled last in every slot.
            feed: per token the slot to take it from; below 0 it is in the batch.

        Returns:
            Normalised hidden states of every token, float32 logits of the batch's last rows (every decoding row,
            then the last token of every prompt), and the cache with this step's keys and values.
        """
        key = (
            batch.tokens.shape,
            batch.row_tables.shape,
            batch.tables.shape,
            cache[0][0].shape,
            last_tokens.shape,
        )
        return self._call("model", key, self._weights, cache, last_tokens, feed, batch)

    def draw(
        self,
        logits: Float[Array, "R V"],
        rows: SamplingRows | None,
        slots: Int[HostOrDevice, " R"],
        last_tokens: Int[Array, " slots"],
    ) -> tuple[Int[Array, " R"], Array, Int[Array, " slots"]]:
        """One token per row, whether its logits were usable, and the tokens noted in their slots (donated)."""
        key = logits.shape, rows is None, last_tokens.shape
        return self._call("draw", key, logits, rows, slots, last_tokens)

    def adjust(self, logits: Float[Array, "R V"], adjustments: Adjustments) -> Float[Array, "R V"]:
        return self._call("adjust", (logits.shape, adjustments.row.shape), logits, adjustments)

    def restrict(
        self, logits: Float[Array, "R V"], allowed: UInt32[HostOrDevice, "R W"]
    ) -> Float[Array, "R V"]:
        return self._call("restrict", logits.shape, logits, allowed)

    def logprobs(self, logits: Float[Array, "R V"], tokens: Int[HostOrDevice, " R"], *, top: int) -> Logprobs:
        return self._call("logprobs", (logits.shape, top), logits, tokens, top=top)

    def score(self, hidden: Float[Array, "T H"], targets: Int[HostOrDevice, " T"], *, top: int) -> Logprobs:
        """Logprobs of given tokens at every row."""
        return self._call("score", (hidden.shape, top), self._weights, hidden, targets, top=top)

    def copy_pages(
        self, cache: KVCache, sources: Int[HostOrDevice, " n"], targets: Int[HostOrDevice, " n"]
    ) -> KVCache:
        """The cache (donated) with some pages copied; all are read before any is written."""
        return self._call("copy", (cache[0][0].shape, sources.shape), cache, sources, targets)

    def forward(self, cache: KVCache, batch: Batch) -> tuple[Float[Array, "T V"], KVCache]:
        """float32 logits of every token of the step: what verification compares. The cache is donated."""
        nothing = jnp.zeros(1, jnp.int32)
        hidden, _, cache = self.run(cache, nothing, jnp.full(batch.tokens.shape, -1, jnp.int32), batch)
        return self._call("logits", hidden.shape, self._weights, hidden), cache

    @property
    def programs(self) -> Mapping[tuple[str, Any], jax.stages.Compiled]:
        """What is compiled so far, by function and by what tells its programs apart."""
        return self._programs

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def compiler(self) -> "Step":
        """A twin whose methods, given shapes in the place of arrays, compile their program and don't run it."""
        twin = copy.copy(self)
        twin._call = self._compile
        return twin

    def _call(self, name: str, key: Any, *args: Any, **static: Any) -> Any:
        program = self._programs.get((name, key)) or self._compile(name, key, *args, **static)
        return program(*args)

    def _compile(self, name: str, key: Any, *args: Any, **static: Any) -> Any:
        program = self._functions[name].lower(*args, **static).compile()
        self._programs[name, key] = program
        return program


def _model(graph, tree, weights, cache: KVCache, last_tokens, feed, batch: Batch):
    fed = last_tokens.at[jnp.maximum(feed, 0)].get(mode="promise_in_bounds")
    batch = batch.with_tokens(jnp.where(feed >= 0, fed, batch.tokens))
    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
    hidden, cache = model(batch, cache)
    last = hidden.at[batch.last_rows()].get(mode="promise_in_bounds")
    return hidden, model.logits(last), cache


def _logits(graph, tree, weights, hidden) -> jax.Array:
    return nnx.merge(graph, jax.tree.unflatten(tree, weights)).logits(hidden)


def _logprobs(backend, logits, tokens, *, top: int) -> Logprobs:
    return Logprobs(*token_logprobs(logits, tokens, top=top, backend=backend))


def _draw(backend, logits, rows: SamplingRows | None, slots, last_tokens):
    tokens, usable = sample(logits, rows, backend=backend)
    return tokens, usable, last_tokens.at[slots].set(tokens, mode="drop")


def _score(graph, tree, weights, hidden, targets, *, top: int) -> Logprobs:
    """Logprobs of `targets` at every row, a few rows at a time."""
    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))

    def block(_, hidden, targets):
        return None, Logprobs(*token_logprobs(model.logits(hidden), targets, top=top, backend=model.backend))

    return over_rows(block, None, hidden, targets, size=SCORE_ROWS)[1]


def _copy_pages(cache: KVCache, sources, targets) -> KVCache:
    return jax.tree.map(lambda pages: pages.at[targets].set(pages[sources]), cache)
