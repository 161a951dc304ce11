"""Compares the bits of the Hopper kernels across batch sizes, positions, chunks and neighbours; needs a Hopper GPU.

    python benchmarks/bits.py [section ...]

One JSON object a line: values compared, values that differ, relative error against float64. Exits 1 if any differ.
"""

import concurrent.futures
import functools
import json
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tune_matmul import unlike

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.larger_tiles import described, prove, trials
from jaxdet.engine.step import Step
from jaxdet.rl import GradientSums, accumulate, pack
from jaxdet.rl.logprobs import HEAD_ROWS
from jaxdet.testing import COMMON, FAMILIES, QWEN3_8B, random_model
from jaxdet.verify.cases import step_cases
from jaxdet.verify.probe import BUCKETS, MODEL_LEN, Probe
from pallas_kernels.attention import mosaic_gpu_sm90 as attention
from pallas_kernels.attention.segments_sm90 import SEGMENT
from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import ROW_BUCKETS, Tile, table, tile
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as rms_norm
from pallas_kernels.rope_cache import mosaic_gpu_sm90 as rope_cache
from pallas_kernels.rope_cache import xla as rope_cache_xla
from pallas_kernels.rope_cache.op import rope_table
from pallas_kernels.sample import mosaic_gpu_sm90 as sample
from pallas_kernels.sample import top_k_sm90
from pallas_kernels.sample import xla as sample_xla
from pallas_kernels.sample.chunks_sm90 import aligned
from pallas_kernels.sample.op import SamplingRows, token_logprobs
from pallas_kernels.sample.xla import INT32_MAX

HOSTILE = jnp.array([jnp.nan, jnp.inf, 1e30, -jnp.inf], jnp.bfloat16)


class Tally:
    """Counts values and differing values; bits, not numbers."""

    def __init__(self):
        self.compared = self.differ = 0

    def __call__(self, got, want):
        got, want = (np.ascontiguousarray(x) for x in (got, want))
        unsigned = np.dtype(f"u{got.itemsize}")
        self.compared += got.size
        self.differ += int((got.view(unsigned) != want.view(unsigned)).sum())

    def on_device(self, got, want):
        """The same for arrays that stay where they are."""
        self.compared += got.size
        self.differ += int(unlike(got, want))

    def row(self, **what):
        return what | {"compared": self.compared, "differ": self.differ}


def error(got, exact) -> float:
    """‖got − exact‖ / ‖exact‖."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))


def rope(head_dim: int, q_heads: int, kv_heads: int, normed: bool):
    rng, tokens, pages = np.random.default_rng(head_dim), 700, 12
    table = jnp.asarray(rope_table(1e4 ** (-2 * np.arange(head_dim // 2) / head_dim), 4096))
    qkv = jnp.asarray(rng.normal(size=(tokens, (q_heads + 2 * kv_heads) * head_dim)), jnp.bfloat16)
    pool = jnp.asarray(rng.normal(size=(pages, kv_heads, 128, head_dim)), jnp.bfloat16)
    positions = jnp.asarray(rng.integers(0, 4096, tokens), jnp.int32)
    slots = jnp.asarray(rng.permutation(np.arange(128, pages * 128))[:tokens], jnp.int32)
    norms = (
        [jnp.asarray(rng.normal(size=head_dim), jnp.float32) for _ in range(2)] if normed else [None, None]
    )

    def run(op, qkv, positions, slots):
        call = functools.partial(op, num_q_heads=q_heads, num_kv_heads=kv_heads, eps=1e-6)
        call = jax.jit(functools.partial(call, q_norm=norms[0], k_norm=norms[1]))
        q, k, v = (np.asarray(x) for x in call(qkv, pool, pool, table, positions, slots))
        page, offset = np.divmod(np.asarray(slots), 128)
        return (q, k[page, :, offset], v[page, :, offset]), (k, v)

    tally = Tally()
    whole, pools = run(rope_cache.rope_cache, qkv, positions, slots)
    for start, count in ((0, 1), (699, 1), (17, 2), (40, 63), (100, 256)):
        rows = slice(start, start + count)
        part, _ = run(rope_cache.rope_cache, qkv[rows], positions[rows], slots[rows])
        for got, want in zip(part, whole, strict=True):
            tally(got, want[rows])
    hostile = qkv.at[::2].set(jnp.resize(HOSTILE, (tokens // 2, 1)))
    for got, want in zip(run(rope_cache.rope_cache, hostile, positions, slots)[0], whole, strict=True):
        tally(got[1::2], want[1::2])
    untouched = np.ones(pages * 128, bool)
    untouched[np.asarray(slots)] = False
    for got in pools:
        rows = got.transpose(0, 2, 1, 3).reshape(pages * 128, -1)
        tally(rows[untouched], np.asarray(pool).transpose(0, 2, 1, 3).reshape(rows.shape)[untouched])
    theirs, _ = run(rope_cache_xla.rope_cache, qkv, positions, slots)
    same = Tally()
    for got, want in zip(whole, theirs, strict=True):
        same(got, want)
    x = np.asarray(qkv, np.float64).reshape(tokens, -1, head_dim)[:, :q_heads]
    if normed:
        x = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-6) * np.asarray(norms[0], np.float64)
    cos, sin = np.split(np.asarray(table, np.float64)[np.asarray(positions)][:, None], 2, axis=2)
    a, b = np.split(x, 2, axis=2)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
    name = {"head_dim": head_dim, "heads": [q_heads, kv_heads], "norm": normed, "unlike xla": same.differ}
    return tally.row(op="rope_cache", **name, error=error(whole[0], exact))


def attend(head_dim: int, heads: int, kv_heads: int, length: int, **option):
    keys, count = jax.random.split(jax.random.key(0), 3), -(-length // 128)
    q = (jax.random.normal(keys[0], (length, heads, head_dim)) * 2).astype(jnp.bfloat16)
    order = np.random.default_rng(0).permutation(count + 3)[:count]
    pools, plain = [], []
    for key in keys[1:]:
        values = jax.random.normal(key, (length, kv_heads, head_dim)).astype(jnp.bfloat16)
        padded = jnp.full((count * 128, kv_heads, head_dim), jnp.nan, jnp.bfloat16).at[:length].set(values)
        pool = jnp.full((count + 3, kv_heads, 128, head_dim), jnp.nan, jnp.bfloat16)
        pools.append(pool.at[order].set(padded.reshape(count, 128, kv_heads, head_dim).transpose(0, 2, 1, 3)))
        plain.append(np.repeat(np.asarray(values, np.float64), heads // kv_heads, axis=1))

    def run(q, lens, counts, longest):
        tables = jnp.tile(jnp.asarray(order, jnp.int32)[None], (len(lens), 1))
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
        settings = {"scale": 0.1, "window": None, "soft_cap": None} | option
        call = functools.partial(attention.attention, **settings, max_query_len=longest)
        return np.asarray(jax.jit(call)(q, *pools, tables, starts, jnp.asarray(lens, jnp.int32)))

    tally = Tally()
    whole = run(q, [length], [length], length)
    at = [0, 1, 127, 128, 129, 640, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, length - 1]
    at = np.unique(np.minimum(at, length - 1))
    tally(run(q[at], at + 1, [1] * len(at), 1), whole[at])
    tally(run(q[-1:], [length], [1], 1), whole[-1:])
    everyone = np.arange(length)  # so many that a CTA walks over all segments of a sequence
    tally(run(q, everyone + 1, [1] * length, 1), whole)
    for start in (0, 333, SEGMENT - 12, SEGMENT):
        tally(run(q[start : start + 100], [start + 100], [100], 100), whole[start : start + 100])
    mixed = jnp.concatenate([jnp.full((40, heads, head_dim), jnp.nan, jnp.bfloat16), q[-60:]])
    tally(run(mixed, [length, length], [40, 60], 60)[40:], whole[-60:])
    out = []
    for i in at:
        seen = slice(max(0, i + 1 - option.get("window", length)), i + 1)
        scores = np.einsum("hd,khd->hk", np.asarray(q[i], np.float64), plain[0][seen]) * 0.1
        if cap := option.get("soft_cap"):
            scores = np.tanh(scores / cap) * cap
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out.append(np.einsum("hk,khd->hd", p / p.sum(axis=1, keepdims=True), plain[1][seen]))
    name = {"head_dim": head_dim, "heads": [heads, kv_heads], "length": length, "option": option}
    return tally.row(op="attention", **name, error=error(whole[at], np.stack(out)))


def attend_long(length: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128):
    """One long prompt: whole, in chunks from anywhere, and its positions as decode batches of 1 to 256."""
    rng, pages = np.random.default_rng(0), length // 128
    order = jnp.asarray(rng.permutation(pages + 7)[:pages] + 1, jnp.int32)
    q = jax.random.normal(jax.random.key(0), (length, heads, head_dim), jnp.bfloat16)
    shape = pages + 8, kv_heads, 128, head_dim
    used = jnp.zeros(pages + 8, bool).at[order].set(True)[:, None, None, None]
    pools = [
        jnp.where(used, jax.random.normal(jax.random.key(i), shape, jnp.bfloat16), jnp.nan) for i in (1, 2)
    ]

    @functools.partial(jax.jit, static_argnames="longest")
    def run(q, lens, starts, longest):
        tables = jnp.tile(order[None], (lens.shape[0], 1))
        settings = {"scale": head_dim**-0.5, "window": None, "soft_cap": None}
        return attention.attention(q, *pools, tables, starts, lens, max_query_len=longest, **settings)

    tally = Tally()

    def compare(q, lens, counts, want, first=0):
        starts = np.concatenate([[0], np.cumsum(counts)])
        got = run(q, jnp.asarray(lens, jnp.int32), jnp.asarray(starts, jnp.int32), max(counts))[first:]
        tally.on_device(got, want)

    whole = run(q, jnp.array([length]), jnp.array([0, length]), length)
    ends = (0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, length // 2, length - 2, length - 1)
    for batch in (1, 2, 8, 33, 64, 131, 200, 256):
        for _ in range(2):
            at = rng.permutation(np.concatenate([ends, rng.integers(0, length, max(batch, 8))]))[:batch]
            compare(q[at], at + 1, [1] * batch, whole[at])
    for chunk in (1, 7, 64, 100, 512, 4096):
        for start in (0, SEGMENT - 7, *rng.integers(0, length - chunk, 4), length - chunk):
            rows = slice(start, start + chunk)
            compare(q[rows], [start + chunk], [chunk], whole[rows])
    hostile = jnp.resize(HOSTILE, (200, 1, 1)) * jnp.ones_like(q[:200])
    for start in (0, 700, length - 300):
        rows = slice(start, start + 300)
        beside = jnp.concatenate([hostile, q[rows]])
        compare(beside, [length, start + 300], [200, 300], whole[rows], first=200)
    return tally.row(op="attention", head_dim=head_dim, heads=[heads, kv_heads], length=length)


def product(k: int, n: int, most: int, counts):
    """`counts` of rows, and hostile values in every other row, against `most` rows at once."""
    x = jax.random.normal(jax.random.key(1), (most, k)).astype(jnp.bfloat16)
    w = (jax.random.normal(jax.random.key(2), (k, n)) * 0.02).astype(jnp.bfloat16)
    run, packed = jax.jit(functools.partial(matmul.matmul, n=n)), matmul.pack(w)
    tally, full = Tally(), run(x, packed)
    for rows in counts:
        tally.on_device(run(x[:rows], packed), full[:rows])
    for rows in (*(rows for rows in (2, 16, 64, 130, 256, 512, 1024) if rows < most), most):
        for first in (0, 1):
            hostile = x[:rows].at[first::2].set(jnp.resize(HOSTILE, (len(x[first:rows:2]), 1)))
            tally.on_device(run(hostile, packed)[1 - first :: 2], full[1 - first : rows : 2])
    exact = np.asarray(x[:8], np.float64) @ np.asarray(w, np.float64)
    return tally.row(
        op="matmul", K=k, N=n, M=most, error=error(full[:8], exact), dot=error(jnp.dot(x, w)[:8], exact)
    )


def tiles():
    """Every tile of the tuning table at the largest row count of its bucket, less five, against 64 × 64."""
    tally = Tally()
    for shape in table():
        k, columns = map(int, shape.split("x"))
        packed = jax.random.normal(jax.random.key(1), (k // 64, columns, 64), jnp.bfloat16)
        plain = jax.jit(functools.partial(matmul.matmul, n=columns, tile=Tile(64, 64)))
        for rows in ROW_BUCKETS:
            x = jax.random.normal(jax.random.key(rows), (rows - 5, k), jnp.bfloat16)
            chosen = tile(rows, k, columns, matmul.column_unit())
            tuned = jax.jit(functools.partial(matmul.matmul, n=columns, tile=chosen))
            tally.on_device(tuned(x, packed), plain(x, packed))
    return tally.row(op="matmul, every tile of the table")


def norm_inside(k: int, n: int, gated: bool = False, dtype=jnp.bfloat16):
    """Products that normalise their own 1 to 4 rows, against RMSNorm and the product: all rows, each alone, and each
    beside hostile ones."""
    weight = jax.random.normal(jax.random.key(3), (k,))
    packed = (0.02 * jax.random.normal(jax.random.key(2), (k // 64, n, 64))).astype(dtype)
    norm = jax.jit(functools.partial(rms_norm.rms_norm, eps=1e-6))
    tally, without = Tally(), Tally()
    product = functools.partial(matmul.matmul, n=n)
    if gated:
        product = functools.partial(matmul.gated_matmul, n=n // 2, activation="silu")
    apart = jax.jit(product)
    together = jax.jit(lambda x, weight, w: product(x, w, norm=(weight, 1e-6)))
    for rows in range(1, matmul.NORMED_ROWS + 1):
        x = jax.random.normal(jax.random.key(rows), (rows, k)).astype(dtype)
        want = apart(norm(x, weight), packed)
        tally.on_device(together(x, weight, packed), want)
        without.on_device(apart(x, packed), want)
        for row in range(rows):
            tally.on_device(together(x[row : row + 1], weight, packed)[0], want[row])
            hostile = jnp.resize(HOSTILE, (rows, 1)).astype(dtype)
            hostile = jnp.broadcast_to(hostile, x.shape).at[row].set(x[row])
            tally.on_device(together(hostile, weight, packed)[row], want[row])
    name = {"K": k, "columns": n, "gated": gated, "dtype": jnp.dtype(dtype).name}
    name["unlike the product alone"] = without.differ
    return tally.row(op="RMSNorm inside a product", **name)


def normalise(size: int):
    x = jax.random.normal(jax.random.key(1), (1000, size)).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(2), (size,))
    run = jax.jit(functools.partial(rms_norm.rms_norm, eps=1e-6))
    tally, full = Tally(), np.asarray(run(x, weight))
    for rows in (1, 2, 3, 8, 64, 257):
        tally(np.asarray(run(x[:rows], weight)), full[:rows])
    tally(np.asarray(run(x.at[1::2].set(jnp.nan), weight))[::2], full[::2])
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    return tally.row(op="rms_norm", H=size, error=error(full, exact))


def sampling_rows(count: int, **over) -> SamplingRows:
    """Rows with every mix of temperature, top-k, top-p and min-p."""
    rng = np.random.default_rng(0)
    of = lambda dtype, *values: jnp.asarray(np.resize(values, count), dtype)  # noqa: E731
    fields = {
        "temperature": of(jnp.float32, 0, 0.7, 1, 1.3, 1, 2, 0.2),
        "top_k": of(jnp.int32, 0, 0, 5, 40, 1000),
        "top_p": of(jnp.float32, 0.9, 1, 0.5, 0.95, 0.99, 0.999, 1, 0.1, 0.8),
        "min_p": of(jnp.float32, 0, 0, 0, 0.05),
        "seed": jnp.asarray(rng.integers(0, 2**32, (count, 2)), jnp.uint32),
        "sample_index": of(jnp.int32, 0, 1, 2),
        "position": jnp.arange(count, dtype=jnp.int32),
    }
    return SamplingRows(**fields | over)


def draw(vocab: int, count: int):
    logits = jax.random.normal(jax.random.key(0), (count, vocab)) * 3
    logits = logits.at[::3].set(jnp.round(logits[::3] * 4) / 4)  # many ties
    rows, tally = sampling_rows(count), Tally()

    tokens_of = jax.jit(sample.sample)

    @jax.jit
    def edges_of(logits, rows):
        peak, _, groups = sample.peaks(logits)
        return sample.edges(logits, peak, groups, rows)

    def run(logits, rows):
        return jax.tree.map(np.asarray, (tokens_of(logits, rows), edges_of(logits, rows)))

    (tokens, usable), edges = run(logits, rows)
    for index in ([0], [count - 1], [5], [3], [40]):
        at = np.array(index)
        got = run(logits[at], jax.tree.map(lambda x, at=at: x[at], rows))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(((tokens, usable), edges)), strict=True):
            tally(a, b[at])
    (beside, finite), others = run(logits.at[::2].set(jnp.nan), rows)
    tally(beside[1::2], tokens[1::2])
    for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(edges), strict=True):
        tally(a[1::2], b[1::2])
    theirs, _ = jax.jit(sample_xla.sample)(logits[:48], jax.tree.map(lambda x: x[:48], rows))
    flags = bool(usable.all() and (finite == (np.arange(count) % 2 == 1)).all())
    unlike = int((np.asarray(theirs) != tokens[:48]).sum())
    return tally.row(op="sample", V=vocab, S=count, usable_right=flags) | {
        "tokens of 48 unlike xla's": unlike
    }


def edge_of_top_k(vocab: int, count: int):
    """Top-k's edge and the last id kept at it against sorting; the rows in reversed order beside NaN ones."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((count, vocab), np.float32) * 3
    logits[1::6] = np.round(logits[1::6])
    logits[2::6] = rng.choice(np.float32([0, -0.0, 1.5]), logits[2::6].shape)
    logits[3::6, ::2] = -np.inf
    logits[4::6] = np.sort(logits[4::6], axis=1)
    logits[5::6, 600:1000] += 50
    several = 1, 2, 20, 20, 50, 297, 298, 1000, vocab, vocab + 1, 0, 10**9
    wanted = rng.choice(np.int32(several), count)
    scale = rng.choice(np.float32([1, 1 / 0.7, 1 / 1.3]), count)
    x = logits * scale[:, None]
    floor = np.full(count, np.finfo(np.float32).min)
    floor[2::5] = np.maximum(floor, x.max(axis=1) - 2)[2::5]

    @jax.jit
    def found(logits, *rest):
        logits = aligned(logits)
        return top_k_sm90.edge(logits, sample.peaks(logits)[2], *rest)

    def sorted_edge(x, floor, wanted):
        kept = -np.sort(-x[x >= floor])
        if wanted < 1 or len(kept) < wanted:
            return -np.inf, -1 if wanted < 1 else INT32_MAX
        edge, tied = kept[wanted - 1], np.flatnonzero(x == kept[wanted - 1])
        left = wanted - (x > edge).sum()
        return edge, INT32_MAX if left >= len(tied) else tied[left - 1]

    tally, mine = Tally(), [np.asarray(v) for v in found(logits, scale, floor, wanted)]
    exact = [sorted_edge(*row) for row in zip(x, floor, wanted, strict=True)]
    for got, want in zip(mine, zip(*exact, strict=True), strict=True):
        tally(got + got.dtype.type(0), np.array(want, got.dtype) + got.dtype.type(0))  # −0 equals 0
    beside = logits[::-1].copy()
    beside[::2, 7] = np.nan
    for got, want in zip(found(beside, scale[::-1], floor[::-1], wanted[::-1]), mine, strict=True):
        tally(np.asarray(got)[1::2], want[::-1][1::2])
    cut = int((mine[1] < INT32_MAX).sum())
    return tally.row(op="edge of top-k", V=vocab, S=count) | {"rows with ties cut or none wanted": cut}


def logprobs(vocab: int, count: int):
    """The op's results and its gradient by the logits; every seventh row has none."""
    logits, rng = jax.random.normal(jax.random.key(0), (count, vocab)) * 3, np.random.default_rng(0)
    ids = rng.integers(0, vocab, count).astype(np.int32)
    d = np.where(np.arange(count) % 7 == 3, 0, rng.standard_normal(count)).astype(np.float32)

    @jax.jit
    def call(logits, ids, d):
        found = token_logprobs(logits, ids, top=5, backend="mosaic_gpu")
        ours = lambda x: token_logprobs(x, ids, top=1, backend="mosaic_gpu")[0]  # noqa: E731
        trained, pull = jax.vjp(ours, logits)
        return *found, trained, pull(d)[0]

    def run(logits, rows):
        return [np.asarray(x) for x in call(logits, ids[rows], d[rows])]

    tally, whole = Tally(), run(logits, np.arange(count))
    tally(whole[4], whole[0])  # the trainer's and the sampler's
    for rows in (np.array([0]), np.array([count - 1]), np.arange(17, 80), rng.permutation(count)):
        for got, want in zip(run(logits[rows], rows), whole, strict=True):
            tally(got, want[rows])
    hostile = logits.at[::2, 5].set(jnp.resize(HOSTILE.astype(jnp.float32), (len(logits[::2]),)))
    beside = run(hostile.at[::4].set(jnp.nan), np.arange(count))
    for got, want in zip(beside, whole, strict=True):
        tally(got[1::2], want[1::2])
    dead = beside[-1][d == 0]
    tally(dead, np.zeros_like(dead))
    rolled = np.asarray(
        jax.jit(lambda x, ids: token_logprobs(x, ids, top=1, backend="mosaic_gpu")[0])(
            jnp.roll(logits, 1000, axis=1), (ids + 1000) % vocab
        )
    )
    wide, at = np.asarray(logits[:32], np.float64), np.arange(32)
    probs = np.exp(wide - wide.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    chosen = np.arange(vocab) == ids[:32, None]
    theirs = jax.jit(functools.partial(token_logprobs, top=5, backend="xla"))(logits, ids)
    return tally.row(
        op="logprobs",
        V=vocab,
        M=count,
        error=error(whole[0][:32], np.log(probs[at, ids[:32]])),
        gradient_error=error(whole[-1][:32], (chosen - probs) * d[:32, None]),
        control_differs=int((rolled != whole[0]).sum()),
    ) | {"ranks and ids unlike xla's": sum(int((whole[i] != theirs[i]).sum()) for i in (1, 3))}


def head_blocks():
    """Logprobs and gradient sums of 5000 tokens, the LM head in blocks of 2048, 512 and 64 rows of logits at most."""
    shape = {"head_dim": 64, "hidden_size": 256, "num_hidden_layers": 1, "vocab_size": 16384}
    config = {"model_type": "qwen3"} | COMMON | FAMILIES["qwen3"] | shape
    model = random_model(config, dtype=jnp.bfloat16, backend="mosaic_gpu", max_model_len=4096)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    micro, _ = pack([rng.integers(0, 16384, n).tolist() for n in (3000, 1000, 5, 900)], 5120)[0]
    weights = rng.standard_normal(micro.targets.shape).astype(np.float32)

    def run(most, weights):
        def step(params, weights):
            objective = lambda values, _: (jnp.sum(values * weights), values)  # noqa: E731
            return accumulate(nnx.merge(graph, params, rest), GradientSums.zeros(params), micro, objective)

        HEAD_ROWS["mosaic_gpu"] = most
        return jax.tree.leaves(jax.jit(step)(params, weights))

    tally, usual = Tally(), HEAD_ROWS["mosaic_gpu"]
    whole = run(usual, weights)
    for most in (512, 64):
        for got, want in zip(run(most, weights), whole, strict=True):
            tally.compared += got.size
            tally.differ += int(unlike(got, want))
    control = sum(int(unlike(*pair)) for pair in zip(run(usual, weights + 1), whole, strict=True))
    HEAD_ROWS["mosaic_gpu"] = usual
    return tally.row(op="LM head in blocks", blocks=[usual, 512, 64], control_differs=control)


def xla_step(dtype: str):
    """Two layers of Qwen3-8B's shape on the xla backend: the step cases of `jaxdet verify`."""
    model = random_model(
        QWEN3_8B | {"num_hidden_layers": 2, "vocab_size": 4096},
        dtype=jnp.dtype(dtype),
        backend="xla",
        max_model_len=MODEL_LEN,
    )
    tiles = prove(model, BUCKETS.all())
    probe = Probe(Step(model, tiles))
    cases = [
        {"case": case.name, "compared": case.compared, "differ": case.differing} for case in step_cases(probe)
    ]
    tally = Tally()
    tally.compared, tally.differ = (sum(case[key] for case in cases) for key in ("compared", "differ"))
    name = {"dtype": dtype, "tiles": described(tiles)}
    return tally.row(op="xla, two layers of Qwen3-8B's shape", **name, cases=cases)


def xla_tiles(dtype: str):
    """Larger tiles of the xla backend against its base ones, in every shape of Qwen3-8B's; a step has up to 8192 rows
    and 512 rows of logits."""
    config = QWEN3_8B | {"num_hidden_layers": 1}
    model = random_model(config, dtype=jnp.dtype(dtype), backend="xla", max_model_len=MODEL_LEN)
    tally, found = Tally(), {}
    for trial in trials(model, [Bucket(512, 0, 0), Bucket(0, 8192, 1)]):
        for tiles, (compared, differ) in zip(
            trial.candidates, trial.differing(trial.compiled()), strict=True
        ):
            found[described(tiles)] = differ
            tally.compared += compared
            tally.differ += differ
    return tally.row(op="xla, larger tiles in Qwen3-8B's shapes", differ_of=found)


def whole_step():
    """A tiny Qwen3, requests run alone against the same in one batch: tokens and logits."""
    from jaxdet import LLM, SamplingParams
    from jaxdet.testing import write_tiny_model

    folder = write_tiny_model(f"{tempfile.mkdtemp()}/model", "qwen3", head_dim=64)
    llm = LLM(
        folder, dtype="bfloat16", max_num_seqs=8, max_model_len=1280, keep_logits=True, compile_at_start=False
    )
    rng = np.random.default_rng(0)
    prompts = [
        {"prompt_token_ids": rng.integers(0, 256, n).tolist()}
        for n in (1, SEGMENT + 100, 33, 130, 5, 260, 64, 9)
    ]
    params = [
        SamplingParams(max_tokens=24, temperature=t, top_p=p, top_k=k, seed=i, ignore_eos=True)
        for i, (t, p, k) in enumerate([(0, 1, 0), (0.8, 0.9, 0), (1, 1, 20), (1.5, 0.95, 50)] * 2)
    ]
    together, tally = llm.generate(prompts, params, use_tqdm=False), Tally()
    for i in range(4):
        alone = llm.generate(prompts[i], params[i], use_tqdm=False)[0].outputs[0]
        other = together[i].outputs[0]
        tally(np.array(alone.token_ids), np.array(other.token_ids))
        tally(np.stack(alone.logits), np.stack(other.logits))
    return tally.row(op="tiny Qwen3, alone against batch of 8", backend=llm.engine.step_fn.backend)


SECTIONS = {
    "xla": [
        functools.partial(job, dtype)
        for job in (xla_tiles, xla_step)
        for dtype in ("bfloat16", "float16", "float32")
    ],
    "rope": [
        functools.partial(rope, *shape)
        for shape in (
            (128, 32, 8, True),
            (128, 32, 8, False),
            (128, 8, 8, True),
            (96, 32, 32, False),
            (128, 28, 4, False),
            (64, 9, 3, True),
            (64, 2, 1, True),
            (96, 8, 2, True),
            (256, 4, 1, True),
        )
    ],
    "sample": [functools.partial(draw, 151936, 96), functools.partial(edge_of_top_k, 151936, 256)],
    "logprobs": [
        functools.partial(logprobs, 151936, 300),
        functools.partial(logprobs, 8193, 300),
        functools.partial(logprobs, 259, 300),
        head_blocks,
    ],
    "attention": [
        functools.partial(attend, 128, 32, 8, 2100),
        functools.partial(attend, 64, 9, 3, 2100),
        functools.partial(attend, 128, 8, 2, 2100, window=200),
        functools.partial(attend, 128, 8, 2, 1300, soft_cap=30.0),
        functools.partial(attend, 96, 4, 4, 1300),
        functools.partial(attend, 256, 4, 1, 1300, window=1100),
        functools.partial(attend, 256, 8, 4, 1300),
    ],
    "attention, long": [functools.partial(attend_long, 32768)],
    "matmul": [
        functools.partial(product, 576, 960, 3000, (1, 2, 7, 8, 9, 63, 64, 65, 100, 130, 256, 513, 2500)),
        # Rows that fill part of a tile.
        functools.partial(product, 4096, 24576, 256, (72, 96, 104, 120, 127, 136, 184, 200)),
        functools.partial(
            product,
            4096,
            6144,
            8192,
            (*range(1, 131), 192, 255, 256, 257, 500, 512, 513, 1000, 1024, 2047, 2500, 4096, 8191),
        ),
    ],
    "tiles": [tiles],
    "norm inside": [
        functools.partial(norm_inside, *shape)
        for shape in (
            (1024, 1536),
            (4096, 6144),
            (5120, 10240),
            (2048, 3072),
            (4096, 24576, True),
            (5120, 51200, True),
            (2048, 16384, True),
            (2048, 3072, False, jnp.float16),
            (4096, 24576, True, jnp.float16),
        )
    ],
    "step": [whole_step],
    "rms_norm": [functools.partial(normalise, size) for size in (576, 4096)],
}


def main(names) -> int:
    assert jax.default_backend() == "gpu", "needs a Hopper GPU"
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    start, failed = time.time(), 0
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # compiling takes longest
        jobs = {pool.submit(job): name for name in names or SECTIONS for job in SECTIONS[name]}
        for job in concurrent.futures.as_completed(jobs):
            try:
                row = job.result()
                failed += row["differ"]
            except Exception as problem:
                row, failed = {"failed": jobs[job], "why": f"{problem!r:.600}"}, failed + 1
            print(json.dumps(row | {"s": round(time.time() - start, 1)}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
