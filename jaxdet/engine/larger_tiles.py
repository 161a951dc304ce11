"""Which larger tiles the xla backend may use: this device proves at start which of them keep the base tiles' bits.

XLA and cuBLAS pick a dot's order by its shape, and nobody knows how on every GPU. So each shape that the model has runs
here as it runs in a step, in base tiles and in larger ones, over rows of many magnitudes beside NaN and infinite ones;
a tile that changes a single bit isn't used. The weights are random, too: what is found holds for any that come later.
"""

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdet.engine.buckets import Bucket
from jaxdet.models.layers import DecoderLM
from pallas_kernels.attention.xla import unrounded
from pallas_kernels.backend import compiler_options, larger_row_tiles, row_tile
from pallas_kernels.matmul.xla import dot
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.proven import ATTENTION_TILE, BASE, Attention, Dot, Tiles, with_tiles
from pallas_kernels.reduce import pin

log = logging.getLogger(__name__)

SEEDS = range(3)
HOSTILE = (jnp.nan, jnp.inf, -jnp.inf, 1e30)
COLUMNS = 1024
"""Of random weights."""
PROMPTS = ((0, 300), (50, 200), (700, 1), (130, 523))
"""Of the attention that is compared: keys before each prompt, and its tokens."""
HOSTILE_PROMPT = 1
"""Has NaN and infinite keys and values."""


class Trial(NamedTuple):
    """One shape, and the larger tiles that it may go in."""

    candidates: tuple[Tiles, ...]
    function: Callable[..., jax.Array]
    draw: Callable[[int], tuple[tuple, tuple, jax.Array]]
    """By seed: arguments; the same with rows in other places; the row that each of these was."""

    def compiled(self) -> list[jax.stages.Compiled]:
        """What runs in base tiles, then per candidate what counts the values of which any bit is unlike that."""
        jit = functools.partial(jax.jit, compiler_options=compiler_options("xla"))
        arguments, moved, origin = jax.eval_shape(lambda: self.draw(0))
        base = jit(with_tiles(BASE, self.function)).lower(*arguments)
        larger = [
            jit(functools.partial(_unlike, with_tiles(tiles, self.function))).lower(
                base.out_info, origin, *moved
            )
            for tiles in self.candidates
        ]
        return [lowered.compile() for lowered in (base, *larger)]

    def differing(self, programs: list[jax.stages.Compiled]) -> list[tuple[int, int]]:
        """Per candidate, values compared with base tiles', and values of which any bit differs.

        Args:
            programs: as `compiled` gives them.
        """
        compared, differ = 0, np.zeros(len(self.candidates), int)
        # NaNs are meant to be there, also where the user has JAX look for them.
        with jax.debug_nans(False), jax.debug_infs(False):
            for seed in SEEDS:
                size, found = self._differing(programs, seed)
                compared, differ = compared + size, differ + found
        return [(compared, n) for n in differ.tolist()]

    def _differing(self, programs: list[jax.stages.Compiled], seed: int) -> tuple[int, list[int]]:
        (base, *larger), (arguments, moved, origin) = programs, self.draw(seed)
        expected = base(*arguments)
        return expected.size, [int(program(expected, origin, *moved)) for program in larger]

    def proven(self, compiling: concurrent.futures.Future[list[jax.stages.Compiled]]) -> list[Tiles]:
        """The candidates that keep every bit."""
        try:
            found = self.differing(compiling.result())
        except jax.errors.JaxRuntimeError as error:  # out of memory, say: base tiles need less
            why = str(error).partition("\n")[0]
            log.warning("larger tiles are not used: %s: %s", described(*self.candidates), why)
            return []
        return [t for t, (compared, n) in zip(self.candidates, found, strict=True) if compared and not n]


def prove(model: DecoderLM, buckets: Iterable[Bucket]) -> Tiles:
    """What of the model's may go in larger tiles; takes seconds on a GPU, nothing elsewhere.

    Args:
        buckets: the steps that there will be; a tile that none of them fills is not tried.
    """
    tried = trials(model, list(buckets))
    if not tried:
        return BASE
    with concurrent.futures.ThreadPoolExecutor(len(tried)) as pool:  # compiling takes longest
        compiling = [pool.submit(trial.compiled) for trial in tried]
        try:  # one after the other, so that the memory holds one shape's matrices at a time
            found = [tiles for pair in zip(tried, compiling, strict=True) for tiles in Trial.proven(*pair)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    device, count = jax.devices()[0].device_kind, sum(len(trial.candidates) for trial in tried)
    log.info(
        "%d of %d larger tiles keep the bits on this %s: %s", len(found), count, device, described(*found)
    )
    return Tiles(sum((t.dots for t in found), ()), sum((t.attention for t in found), ()))


def described(*tiles: Tiles) -> str:
    """For people: "4096 × 6144 bfloat16 in 256, 512 rows; …"; empty without any."""
    shapes: dict[str, list[str]] = {}
    for k, n, dtype, rows in (d for t in tiles for d in t.dots):
        shapes.setdefault(f"{k} × {n} {dtype}", []).append(str(rows))
    parts = [f"{shape} in {', '.join(rows)} rows" for shape, rows in shapes.items()]
    for a in (a for t in tiles for a in t.attention):
        options = [
            f"{name} {x}" for name, x in (("window", a.window), ("soft cap", a.soft_cap)) if x is not None
        ]
        shape = ", ".join([f"{a.q_heads} / {a.kv_heads} heads × {a.head_dim} {a.dtype}", *options])
        parts.append(f"attention ({shape}) in {ATTENTION_TILE} queries")
    return "; ".join(parts)


def trials(model: DecoderLM, buckets: list[Bucket]) -> list[Trial]:
    """Of every shape that some step fills a larger tile of; none where nothing larger than base tiles pays."""
    c, dtype = model.config, np.dtype(model.dtype).name
    if model.backend != "xla" or not larger_row_tiles(dtype):
        return []
    tokens, logits = max(b.rows + b.tokens for b in buckets), max(b.sampled for b in buckets)
    layers = [x.shape for x in jax.tree.leaves(nnx.state(model.layers, nnx.Param)) if x.ndim == 2]
    most = {model.head[...].shape: logits} | dict.fromkeys(layers, tokens)
    found = []
    for (k, n), rows in most.items():
        filled = rows + -rows % row_tile(dtype)
        if sizes := [size for size in larger_row_tiles(dtype) if size <= filled]:
            found.append(_dots(k, n, dtype, sizes))
    if any(b.seqs and b.tokens >= ATTENTION_TILE * b.seqs for b in buckets):
        heads = c.num_q_heads, c.num_kv_heads, c.head_dim, dtype
        shapes = dict.fromkeys(Attention(*heads, window, c.soft_cap) for window in c.windows)
        found += map(_attention, shapes)
    return found


def _dots(k: int, n: int, dtype: str, sizes: list[int]) -> Trial:
    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        x, order = _rows(keys[0], (max(sizes), k), dtype), jax.random.permutation(keys[1], max(sizes))
        # A few columns over and over: random numbers for a whole LM head would take many times its memory.
        weights = _normal(keys[2], (k, min(n, COLUMNS)), dtype)[:, np.arange(n) % COLUMNS]
        return (x, weights), (x[order], weights), order

    candidates = tuple(Tiles(dots=(Dot(k, n, dtype, size),)) for size in sizes)
    return Trial(candidates, functools.partial(dot, n=n), draw)


def _attention(shape: Attention) -> Trial:
    contexts, counts = np.array(PROMPTS, np.int32).T
    starts, lens = np.append(0, np.cumsum(counts)).astype(np.int32), contexts + counts
    tokens, pages = int(starts[-1]), -(-int(lens.max()) // PAGE_SIZE)
    order = 1 + np.random.default_rng(0).permutation(len(PROMPTS) * pages).astype(np.int32)
    tables = order.reshape(-1, pages)
    pool = 1 + order.size, shape.kv_heads, PAGE_SIZE, shape.head_dim

    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), 5)
        q = _normal(keys[0], (tokens, shape.q_heads, shape.head_dim), shape.dtype) * 2
        caches = []
        for key, hostile in (keys[1:3], keys[3:5]):
            spoilt = _rows(hostile, (pages, np.prod(pool[1:])), shape.dtype).reshape(pages, *pool[1:])
            caches.append(_normal(key, pool, shape.dtype).at[tables[HOSTILE_PROMPT]].set(spoilt))
        arguments = q, *caches, tables, starts, lens
        return arguments, arguments, jnp.arange(tokens)

    options = {"scale": shape.head_dim**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}
    function = functools.partial(unrounded, **options, max_query_len=tokens)
    return Trial((Tiles(attention=(shape,)),), function, draw)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rows(key, shape: tuple[int, int], dtype: str) -> jax.Array:
    """Rows whose entries have many magnitudes; every fourth has a few hostile ones."""
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], shape) * 2.0 ** jax.random.randint(keys[1], shape, -8, 4)
    hostile = jax.random.choice(keys[2], jnp.array(HOSTILE), (shape[0], 1))
    spoilt = jax.random.bernoulli(keys[3], 0.25, (shape[0], 1)) & jax.random.bernoulli(keys[4], 0.01, shape)
    return jnp.where(spoilt, hostile, x).astype(dtype)


def _unlike(function: Callable[..., jax.Array], expected, origin, *arguments) -> jax.Array:
    """How many of the function's values have other bits than those expected of the rows that theirs were."""
    unsigned = f"uint{8 * expected.dtype.itemsize}"
    found, expected = (
        jax.lax.bitcast_convert_type(pin(x), unsigned) for x in (function(*arguments), expected[origin])
    )
    return jnp.sum(found != expected)
