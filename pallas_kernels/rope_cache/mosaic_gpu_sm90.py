"""Query/key norm, RoPE and cache write on Hopper, one launch: a CTA of 128 threads takes 16 heads of a token.

Per head, in float32: Σx² = Σ over columns i of fma(x[i], x[i], round(x[i + D/2]²)) in one tree that D alone fixes
(8 lanes a head, see `_layout`), x · 1/√((Σx² + D·eps) / D) · weight, then (x₁c − x₂s, x₂c + x₁s) with every
product rounded before the sum, one rounding at the end. Values are copied. How heads fall on CTAs touches no bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    add_rounded,
    fused_multiply_add,
    interpreting,
    kernel_in_place,
    load_part,
    pl,
    plgpu,
    require_hopper,
    store_part,
)

HEADS = 16
VECTOR = {64: 4, 96: 2, 128: 8, 256: 8}
"""head_dim → columns that a lane holds side by side."""


def rope_cache(
    qkv, k_pages, v_pages, rope, positions, slots, *, num_q_heads, num_kv_heads, q_norm, k_norm, eps
):
    """See `op.rope_cache`; bfloat16 or float16, head_dim 64, 96, 128 or 256."""
    require_hopper("rope_cache")
    dim = k_pages.shape[3]
    if qkv.dtype not in (jnp.bfloat16, jnp.float16) or {k_pages.dtype, v_pages.dtype} != {qkv.dtype}:
        raise ValueError(
            f"rope_cache: qkv is {qkv.dtype} and the cache {k_pages.dtype}; mosaic_gpu takes bfloat16 or float16; "
            "use backend='xla'"
        )
    if dim not in VECTOR:
        raise ValueError(
            f"rope_cache: head_dim={dim}; mosaic_gpu takes {', '.join(map(str, VECTOR))}; use backend='xla'"
        )
    tokens, norm = qkv.shape[0], [] if q_norm is None else [q_norm, k_norm]
    call = _kernel(
        tokens,
        num_q_heads,
        num_kv_heads,
        dim,
        k_pages.shape[2],
        qkv.dtype,
        len(norm) > 0,
        eps,
        interpreting(),
    )
    k_cache, v_cache = jax.new_ref(k_pages), jax.new_ref(v_pages)
    rows = qkv.reshape(tokens, num_q_heads + 2 * num_kv_heads, dim)
    q = call(rows, rope, positions, slots, *norm, k_cache, v_cache)
    return q, jax.freeze(k_cache), jax.freeze(v_cache)


def _layout(dim: int):
    """[HEADS, D/2]: a head on 8 lanes, a warp on 4 heads."""
    v = VECTOR[dim]
    tiling = plgpu.Tiling(((HEADS, 8 * v), (4, 8 * v), (v,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


@functools.cache
def _kernel(tokens, q_heads, kv_heads, dim, page, dtype, normed, eps, _interpreting):
    rows, half = q_heads + 2 * kv_heads, dim // 2
    parts, layout = -(-rows // HEADS), _layout(dim)
    held = min(rows, HEADS)
    columns = layout.reduce(0)

    def body(qkv_g, rope_g, positions_g, slots_g, *rest):
        *norm_g, k_g, v_g, q_g = rest
        token = lax.axis_index("token")
        part = lax.axis_index("part")
        first = jnp.minimum(part * HEADS, rows - held)  # the last part may repeat heads of the one before

        def head_halves(start):
            heads = qkv_g.at[token, pl.ds(first, held), pl.ds(start, half)]
            return load_part(heads, (HEADS, half), layout)

        values = [head_halves(start) for start in (0, half)]
        slot, position = slots_g[token], positions_g[token]

        def halves(ref):
            return (
                plgpu.load(ref.at[pl.ds(start, half)], layout=columns, optimized=False) for start in (0, half)
            )

        def across(x):
            return lax.broadcast_in_dim(x, (HEADS, half), [1])

        cos, sin = (across(x) for x in halves(rope_g.at[position]))
        weights = [[across(x) for x in halves(w)] for w in norm_g]
        x, y = (value.astype(jnp.float32) for value in values)
        if normed:
            total = jnp.sum(fused_multiply_add(x, x, y * y, layout), axis=1)
            inverse = lax.rsqrt((total + dim * eps) * (1.0 / dim))
            inverse = lax.broadcast_in_dim(inverse, (HEADS, half), [0])
            head = plgpu.broadcasted_iota(jnp.int32, (HEADS, half), 0, layout=layout) + first
            of_q = head < q_heads
            x, y = (
                (value * inverse) * jnp.where(of_q, q_weight, k_weight)
                for value, q_weight, k_weight in zip((x, y), *weights, strict=True)
            )
        rotated = [
            add_rounded(x * cos, -(y * sin), layout).astype(dtype),
            add_rounded(y * cos, x * sin, layout).astype(dtype),
        ]
        index, offset = lax.div(slot, jnp.int32(page)), lax.rem(slot, jnp.int32(page))
        for number in range(parts):

            @pl.when(part == number)
            def _(number=number):
                first, begin = min(number * HEADS, rows - held), 0
                for source, target, heads in (
                    (rotated, lambda *at: q_g.at[token, *at], q_heads),
                    (rotated, lambda at, columns: k_g.at[index, at, offset, columns], kv_heads),
                    (values, lambda at, columns: v_g.at[index, at, offset, columns], kv_heads),
                ):
                    low, high = max(first, begin), min(first + held, begin + heads)
                    if low < high:
                        for start, value in zip((0, half), source, strict=True):
                            to = target(pl.ds(low - begin, high - low), pl.ds(start, half))
                            store_part(value, layout, to, (low - first, high - low))
                    begin += heads

    return kernel_in_place(
        body,
        kernel_name="rope_cache",
        out_type=jax.ShapeDtypeStruct((tokens, q_heads, dim), dtype),
        grid=(tokens, parts),
        grid_names=("token", "part"),
    )
