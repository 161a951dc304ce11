"""The arithmetic that prefill and decode share on Hopper; every line of it is part of the contract.

Scores are in log2 units: s · c with c = log2(e) · scale, or log2(e) · cap after a soft-cap. A warpgroup holds 64
query rows of a prefill, and of a decode step the heads of a group. Within a segment, from the empty state m = −1e30,
l = 0, acc = 0, blocks of keys ascending:

    m′ = max(m, max(s) · c);  p = 2^fma(s, c, −m′);  α = 2^(m − m′)
    l = fma(l, α, Σp);  acc = acc · α, then += round(p) · V, keys ascending in wgmma steps of 16

Σp is a pinned tree of the float32 p: for column 8g + 2t + e, even g ascending plus odd g ascending, then
e = 0 plus e = 1, then (t₀ + t₁) + (t₂ + t₃). Segments merge in ascending order:

    M′ = max(M, m);  a = 2^(M − M′);  b = 2^(m − M′);  O = fma(O, a, acc · b);  L = fma(L, a, l · b)

and the result is O · (1 / L) + 0, rounded once; the sum turns −0 into +0, so that a block or segment of
masked keys (p = 0, b = 0) is an exact no-op wherever it is skipped.
"""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import fused_multiply_add, interpreting, pl, plgpu, reduce_columns

LOG2_E = math.log2(math.e)
EMPTY = -1e30
ROWS = 64
TILE = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)


def full(shape, value, layout):
    """A constant array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def spread(x, columns: int):
    """[rows] → [rows, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def empty(head_dim: int):
    """(acc, m, l) before the first block of a segment; also (O, M, L) before the first segment."""
    return full((ROWS, head_dim), 0, TILE), full((ROWS,), EMPTY, ROW), full((ROWS,), 0, ROW)


def factor(scale: float, soft_cap: float | None) -> float:
    """c of the block step."""
    return LOG2_E * (scale if soft_cap is None else soft_cap)


def cap(scores, scale: float, soft_cap: float | None):
    """tanh(scale · s / cap) as 1 − 2 / (1 + 2^(2 log2(e) scale / cap · s)); `factor` multiplies by cap."""
    if soft_cap is None:
        return scores
    return 1.0 - 2.0 * (1.0 / (1.0 + jnp.exp2(scores * (2.0 * LOG2_E * scale / soft_cap))))


def mask(scores, row_position, key_position, window: int | None):
    """−inf where a key lies after its query or outside the window; positions are like the scores, int32."""
    visible = row_position >= key_position
    if window is not None:
        visible = visible & (key_position + window > row_position)
    return jnp.where(visible, scores, -jnp.inf)


def block(scores, m, mass, c: float, dtype, layout=TILE, row_layout=ROW):
    """One block before its P · V product: (rounded p, α, m′, mass′)."""
    new = jnp.maximum(m, scores.max(axis=1) * c)
    alpha = jnp.exp2(m - new)
    scaled = fused_multiply_add(scores, full(scores.shape, c, layout), spread(-new, scores.shape[1]), layout)
    p = jnp.exp2(scaled)
    mass = fused_multiply_add(mass, alpha, reduce_columns(p, layout, row_layout), row_layout)
    return p.astype(dtype), alpha, new, mass


def accumulate(acc, p, values, meanwhile=lambda: None):
    """acc + p · values, a tile in shared memory; `meanwhile` runs while the product is under way."""
    if interpreting():  # neither takes an operand in registers nor starts an accumulator from a value
        product = lax.dot(p, values[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a copy may write over the tile next, as after a wgmma
        meanwhile()
        return acc + product

    def multiply(ref):
        plgpu.wgmma(ref, p, values)
        meanwhile()

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def turned_product(keys, queries):
    """keys [keys, D] · queriesᵀ, both in shared memory."""

    def multiply(ref):
        if interpreting():  # whose products are not the same on both sides
            plgpu.wgmma(ref, queries, keys.transpose((1, 0)))
            return ref[...].T
        plgpu.wgmma(ref, keys, queries.transpose((1, 0)))
        return ref[...]

    shape = keys.shape[0], queries.shape[0]
    return pl.run_scoped(multiply, plgpu.ACC(shape[::-1] if interpreting() else shape, jnp.float32))


def accumulate_turned(acc, values, p):
    """acc [D, rows] + valuesᵀ · pᵀ, where values [keys, D] and p [rows, keys] are in shared memory."""
    if interpreting():
        return accumulate(acc.T, p[...], values).T

    def multiply(ref):
        plgpu.wgmma(ref, values.transpose((1, 0)), p.transpose((1, 0)))

    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def merge(out, best, total, acc, m, mass, layout=TILE, row_layout=ROW):
    """(O, M, L) with one more segment."""
    a, b, new, total = shares(best, total, m, mass, row_layout)
    if out.ndim == 2:
        a, b = spread(a, out.shape[1]), spread(b, out.shape[1])
    return fused_multiply_add(out, a, acc * b, layout), new, total


def shares(best, total, m, mass, row_layout=ROW):
    """What O and acc are multiplied by when they merge, and the new (M, L)."""
    new = jnp.maximum(best, m)
    a, b = jnp.exp2(best - new), jnp.exp2(m - new)
    return a, b, new, fused_multiply_add(total, a, mass * b, row_layout)


def finish(out, total, dtype):
    """The output; zero for rows that saw no key."""
    inverse = reciprocal(total)
    if out.ndim == 2:
        inverse = spread(inverse, out.shape[1])
    return (out * inverse + 0.0).astype(dtype)


def reciprocal(total):
    """1 / L, and 1 for rows that saw no key."""
    return 1.0 / jnp.where(total == 0.0, 1.0, total)


def log_sum_exp(best, total):
    """M + log2 L of a row's merged segments; zero for rows that saw no key."""
    log = jnp.log(jnp.where(total == 0.0, 1.0, total))
    lse = fused_multiply_add(log, full(log.shape, LOG2_E, ROW), best, ROW)
    return jnp.where(total == 0.0, 0.0, lse)


def columns(head_dim: int) -> int:
    """So many columns of a `swizzled` buffer are loaded together."""
    return 64 if head_dim % 64 == 0 else 32


def clear_tail(values, live):
    """Zeroes rows from `live` on of a [keys, D] value tile in shared memory: 0 · NaN must not happen."""
    keys, head_dim = values.shape
    width = columns(head_dim)

    @pl.when(live < keys)
    def _():
        for first in range(0, keys, ROWS):

            @pl.when(live < first + ROWS)
            def _(first=first):
                for column in range(0, head_dim, width):
                    part = values.at[pl.ds(first, ROWS), pl.ds(column, width)]
                    row = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 0, layout=TILE) + first
                    kept = plgpu.load(part, layout=TILE)
                    part[...] = jnp.where(row < live, kept, jnp.zeros((), values.dtype))

        plgpu.commit_smem()


def swizzled(columns: int, itemsize: int = 2):
    """Transforms of a [rows, columns] buffer that TMA and wgmma share."""
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
