"""The programs of a step. Each is compiled once for each shape, and counted.

What the model runs depends on the step's bucket, what follows it on the number of sampled rows and on what was asked
for: kept apart, their variants add up instead of multiplying.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxdet.engine import lowered_cache
from jaxdet.engine.lowered_cache import Program
from jaxdet.engine.packed import Layout, layout_of, pack, unpack
from jaxdet.models.layers import Batch, DecoderLM, KVCache, new_cache
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.backend import compiler_options
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE
from pallas_kernels.proven import BASE, Tiles, with_tiles
from pallas_kernels.sample.op import Adjustments, SamplingRows, adjust, restrict, sample, token_logprobs

SCORE_ROWS = 64
"""Rows of logits alive at once while every position is scored."""

KEPT = ("model", "decode", "logits", "draw", "logprobs", "score")
"""Programs with kernels of ours, slow enough to lower to be worth keeping."""


class Logprobs(NamedTuple):
    """What `token_logprobs` returns: of a token, its rank, and of the most likely ones."""

    logprob: HostOrDevice
    rank: HostOrDevice
    top: HostOrDevice
    top_ids: HostOrDevice


jax.export.register_namedtuple_serialization(Logprobs, serialized_name=f"{__name__}.Logprobs")


class StepOutput(NamedTuple):
    """Per row of logits the sampled token and whether the logits were usable; the rest when asked for.

    After several steps in a row both have them in front: [steps, rows].
    """

    tokens: HostOrDevice
    usable: HostOrDevice
    logits: HostOrDevice | None
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None
    """Per token of the step."""


class Step:
    """A model's compiled programs. Every method is a pure function; donated arguments are named.

    Args:
        tiles: those of the xla backend that were proven here, beside its base tiles.
    """

    def __init__(self, model: DecoderLM, tiles: Tiles = BASE):
        self.config, self.dtype, self.backend = model.config, model.dtype, model.backend
        self.tiles = tiles
        graph, self.state = nnx.split(model)
        self.graph, backend = graph, self.backend
        bind = functools.partial
        self._functions = {
            "model": (bind(_model, graph, self._tree), {"donate_argnums": 1}),
            "decode": (bind(_decode, graph, self._tree, backend), {"donate_argnums": (1, 2)}),
            "logits": (bind(_logits, graph, self._tree), {}),
            "draw": (bind(_draw, backend), {"donate_argnums": 1}),
            "adjust": (adjust, {}),
            "restrict": (restrict, {}),
            "logprobs": (bind(_logprobs, backend), {}),
            "score": (bind(_score, graph, self._tree), {}),
            "copy": (_copy_pages, {"donate_argnums": 0}),
            "cast": (_cast_like, {"donate_argnums": 1, "keep_unused": True}),
        }
        self._programs: dict[tuple, jax.stages.Compiled] = {}

    @property
    def state(self) -> nnx.State:
        """The weights. They are kept flat: flattening an nnx.State takes a millisecond a step."""
        return jax.tree.unflatten(self._tree, self._weights)

    @state.setter
    def state(self, state: nnx.State) -> None:
        self._weights, self._tree = jax.tree.flatten(state)

    @property
    def params(self) -> nnx.State:
        """The weights that training changes: all but RoPE's tables."""
        return nnx.filter_state(self.state, nnx.Param)

    def update_params(self, params: nnx.State) -> None:
        """Casts new parameters into the memory of the present ones, which are donated; one program, on the device.

        Raises:
            ValueError: a parameter is missing, surplus, of another shape or no float.
        """
        old, rest = nnx.split_state(self.state, nnx.Param, ...)
        _check_like(params, old)
        leaves, tree = jax.tree.flatten(old)
        new = self._call("cast", _dtypes(params), jax.tree.leaves(params), leaves)
        self.state = nnx.merge_state(jax.tree.unflatten(tree, new), rest)

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
            batch.query_alignment,
            cache[0][0].shape,
            last_tokens.shape,
        )
        return self._call("model", key, self._weights, cache, last_tokens, told=(feed, batch))

    def decode(
        self,
        cache: KVCache,
        last_tokens: Int[Array, " slots"],
        feed: Int[HostOrDevice, " R"],
        batch: Batch,
        counts: Int[HostOrDevice, " R"],
        rows: SamplingRows | None,
        slots: Int[HostOrDevice, " R"],
        *,
        steps: int,
    ) -> tuple[Int[Array, "steps R"], Bool[Array, "steps R"], Int[Array, " slots"], KVCache]:
        """`run` and `draw`, so many times in a row: each row's token is the next step's input.

        The cache and `last_tokens` are donated.

        Args:
            batch: the first step's, rows alone.
            counts: tokens that each row may sample; after them it touches no page but the trash page, and what it
                samples means nothing.
            rows: the first step's; positions go up from there.

        Returns:
            Tokens and whether the logits were usable, `last_tokens` with every row's last, the cache.
        """
        key = batch.row_tables.shape, rows is None, cache[0][0].shape, last_tokens.shape, steps
        told = feed, batch, counts, rows, slots
        return self._call("decode", key, self._weights, cache, last_tokens, told=told, steps=steps)

    def draw(
        self,
        logits: Float[Array, "R V"],
        rows: SamplingRows | None,
        slots: Int[HostOrDevice, " R"],
        last_tokens: Int[Array, " slots"],
    ) -> tuple[Int[Array, " R"], Array, Int[Array, " slots"]]:
        """One token per row, whether its logits were usable, and the tokens noted in their slots (donated)."""
        key = logits.shape, rows is None, last_tokens.shape
        return self._call("draw", key, logits, last_tokens, told=(rows, slots))

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
        hidden, _, cache = self.run(cache, nothing, np.full(batch.tokens.shape, -1, np.int32), batch)
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
        return self._twin(self._compile)

    def lowerer(self, kept_in: Path, platform: str) -> "Step":
        """A twin whose methods, given shapes, lower their program into a folder of `lowered_cache`."""
        return self._twin(
            lambda name, _, *args, **told: lowered_cache.keep(
                self._program(name, *args, **told), kept_in, platform
            )
        )

    def seeker(self, kept_in: Path) -> "Step":
        """A twin whose methods, given shapes, tell whether their program belongs in that folder and isn't there."""
        here = lowered_cache.folder(self.backend) == kept_in  # a drafter may have another backend
        return self._twin(
            lambda name, _, *args, **told: (
                here
                and name in KEPT
                and not lowered_cache.path(self._program(name, *args, **told), kept_in).exists()
            )
        )

    def _twin(self, call: Callable[..., Any]) -> "Step":
        twin = copy.copy(self)
        twin._call = call
        return twin

    def _call(self, name: str, key: Any, *args: Any, told: tuple | None = None, **static: Any) -> Any:
        program = self._programs.get((name, key)) or self._compile(name, key, *args, told=told, **static)
        return program(*args) if told is None else program(*args, pack(told))

    def _compile(self, name: str, key: Any, *args: Any, told: tuple | None = None, **static: Any) -> Any:
        program = self._program(name, *args, told=told, **static)
        if name in KEPT and (folder := lowered_cache.folder(self.backend)):
            lowered = lowered_cache.lower(program, folder)
        else:
            lowered = program.jit(functools.partial(program.function, **program.static)).lower(*program.args)
        self._programs[name, key] = compiled = lowered.compile()
        return compiled

    def _program(self, name: str, *args: Any, told: tuple | None = None, **static: Any) -> Program:
        if told is not None:
            args, static = (*args, pack(told)), static | {"layout": layout_of(told)}
        function, options = self._functions[name]
        jit = functools.partial(jax.jit, compiler_options=compiler_options(self.backend), **options)
        origin = name, self.config, str(self.dtype), self.backend, self.tiles
        return Program(with_tiles(self.tiles, function), args, static, origin, jit)


def _model(graph, tree, weights, cache: KVCache, last_tokens, told, *, layout: Layout):
    feed, batch = unpack(told, layout)
    batch = batch.with_tokens(_fed(last_tokens, feed, batch))
    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
    hidden, cache = model(batch, cache)
    last = hidden.at[batch.last_rows()].get(mode="promise_in_bounds")
    return hidden, model.logits(last), cache


def _decode(graph, tree, backend, weights, cache, last_tokens, told, *, layout: Layout, steps: int):
    feed, batch, counts, rows, slots = unpack(told, layout)
    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
    tables, row = batch.row_tables, jnp.arange(batch.rows)

    def one(step, state):
        cache, tokens, found, usable = state
        ahead = jnp.minimum(step, jnp.maximum(counts - 1, 0))
        positions = batch.positions + ahead
        page = tables.at[row, positions // PAGE_SIZE].get(mode="promise_in_bounds")
        page = jnp.where(step < counts, page, TRASH_PAGE)
        here = dataclasses.replace(
            batch,
            tokens=tokens,
            positions=positions,
            slots=page * PAGE_SIZE + positions % PAGE_SIZE,
            row_lens=batch.row_lens + ahead,
        )
        hidden, cache = model(here, cache)
        drawn = rows and dataclasses.replace(rows, position=rows.position + ahead)
        tokens, ok = sample(model.logits(hidden), drawn, backend=backend)
        return cache, tokens, found.at[step].set(tokens), usable.at[step].set(ok)

    shape = steps, batch.rows
    state = (
        cache,
        _fed(last_tokens, feed, batch),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )
    cache, tokens, found, usable = lax.fori_loop(0, steps, one, state)
    return found, usable, last_tokens.at[slots].set(tokens, mode="drop"), cache


def _fed(last_tokens, feed, batch: Batch) -> jax.Array:
    """The batch's tokens, those that only the device knows among them."""
    sampled = last_tokens.at[jnp.maximum(feed, 0)].get(mode="promise_in_bounds")
    return jnp.where(feed >= 0, sampled, batch.tokens)


def _logits(graph, tree, weights, hidden) -> jax.Array:
    return nnx.merge(graph, jax.tree.unflatten(tree, weights)).logits(hidden)


def _logprobs(backend, logits, tokens, *, top: int) -> Logprobs:
    return Logprobs(*token_logprobs(logits, tokens, top=top, backend=backend))


def _draw(backend, logits, last_tokens, told, *, layout: Layout):
    rows, slots = unpack(told, layout)
    tokens, usable = sample(logits, rows, backend=backend)
    return tokens, usable, last_tokens.at[slots].set(tokens, mode="drop")


def _score(graph, tree, weights, hidden, targets, *, top: int) -> Logprobs:
    """Logprobs of `targets` at every row, a few rows at a time.

    The last rows are as many as the others, some of them once more, to the same bits: filling up would copy all.
    """
    model = nnx.merge(graph, jax.tree.unflatten(tree, weights))
    rows, short = len(hidden), max(SCORE_ROWS - len(hidden), 0)
    hidden, targets = jnp.pad(hidden, ((0, short), (0, 0))), jnp.pad(targets, (0, short))
    count = -(-rows // SCORE_ROWS)
    again = count * SCORE_ROWS - len(hidden)

    def block(start):
        x, ids = (lax.dynamic_slice_in_dim(part, start, SCORE_ROWS) for part in (hidden, targets))
        return Logprobs(*token_logprobs(model.logits(x), ids, top=top, backend=model.backend))

    def joined(parts):
        whole = parts[:-1].reshape((count - 1) * SCORE_ROWS, *parts.shape[2:])
        return jnp.concatenate([whole, parts[-1, again:]])[:rows]

    starts = jnp.minimum(jnp.arange(count) * SCORE_ROWS, len(hidden) - SCORE_ROWS)
    return jax.tree.map(joined, lax.map(block, starts))


def _copy_pages(cache: KVCache, sources, targets) -> KVCache:
    return jax.tree.map(lambda pages: pages.at[targets].set(pages[sources]), cache)


def _cast_like(new: list[jax.Array], old: list[jax.Array]) -> list[jax.Array]:
    return [x.astype(y.dtype) for x, y in zip(new, old, strict=True)]


def _dtypes(params: nnx.State) -> tuple:
    return tuple(x.dtype for x in jax.tree.leaves(params))


def _check_like(params: nnx.State, old: nnx.State) -> None:
    """Raises unless both trees have the same leaves; names the first that differs."""
    found, expected = (
        {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, old)
    )
    if different := sorted(found.keys() ^ expected.keys()):
        state = "is missing" if different[0] in expected else "is not one of the model's"
        raise ValueError(f"params: {different[0]} {state}; use the tree of llm.params")
    for name, x in expected.items():
        new = found[name]
        if new.shape != x.shape or not jnp.issubdtype(new.dtype, jnp.floating):
            raise ValueError(
                f"params: {name} is {new.dtype}{list(new.shape)} but must be floats of shape {list(x.shape)}; "
                "use the layout of llm.params"
            )
