"""Query/key norm, RoPE and cache write on TPUs, one launch: tiles of `tile_tokens` tokens, whatever their number.

Per head of a tile, in float32: Σx² in Mosaic's tree for [tile_tokens, D], x · 1/√((Σx² + D·eps) / D) · weight, then
(x₁c − x₂s, x₂c + x₁s), one rounding at the end. Values are copied.

HBM is read and written in whole groups of keys (`group_keys`), so a tile reads every group that its tokens fall into
once, puts their keys in and writes it back before the next tile begins. Tokens of one group share the buffer of the
first of them. The reads are under way while the tile is computed. Where the pages lie transposed (`tiles_tpu`), a key
is a column of its page and the group is the page.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tiles_tpu import LANES, VMEM_LIMIT, as_stored, in_hbm, lies_transposed, require_dtype

MOST_TOKENS = 32
BUFFER_BYTES = 12 * 2**20
"""Vector memory for the groups of keys of one tile, and as much again for those of values."""


def group_keys(page: int, head_dim: int, dtype) -> int:
    """Keys that HBM reads and writes together: a tile of 32-bit words has 8 rows."""
    return page if lies_transposed(head_dim) else 32 // jnp.dtype(dtype).itemsize


def tile_tokens(kv_heads: int, page: int, head_dim: int, dtype) -> int:
    """Tokens computed at once, a function of the model alone: as many as have buffers."""
    group = kv_heads * group_keys(page, head_dim, dtype) * head_dim * jnp.dtype(dtype).itemsize
    return max(8, min(MOST_TOKENS, BUFFER_BYTES // group // 8 * 8))


def rope_cache(
    qkv, k_pages, v_pages, rope, positions, slots, *, num_q_heads, num_kv_heads, q_norm, k_norm, eps
):
    """See `op.rope_cache`; float32 or bfloat16, pages of 128 keys."""
    require_dtype("rope_cache: qkv", qkv.dtype)
    if {k_pages.dtype, v_pages.dtype} != {qkv.dtype}:
        raise ValueError(f"rope_cache: qkv is {qkv.dtype} but the cache {k_pages.dtype}; use one dtype")
    tokens, width = qkv.shape
    page, dim = k_pages.shape[2:]
    if page != LANES:
        raise ValueError(f"rope_cache: pages of {page} keys; mosaic_tpu takes {LANES}; use backend='xla'")
    group, tile = group_keys(page, dim, qkv.dtype), tile_tokens(num_kv_heads, page, dim, qkv.dtype)
    tiles = pl.cdiv(tokens, tile)
    slots = jnp.asarray(slots)
    q_width = num_q_heads * dim
    norms = [] if q_norm is None else [q_norm[None], k_norm[None]]
    vector = pl.BlockSpec((1, dim), lambda i, *_: (0, 0))
    pool = pl.BlockSpec(memory_space=pltpu.HBM)
    transposed = lies_transposed(dim)
    rows = pltpu.VMEM((num_kv_heads, dim, LANES) if transposed else (num_kv_heads, tile, dim), jnp.float32)
    shape = (dim, page) if transposed else (group, dim)
    groups = pltpu.VMEM((tile, num_kv_heads, *shape), qkv.dtype)
    k_pages, v_pages = in_hbm(k_pages, dim), in_hbm(v_pages, dim)
    q, k_pages, v_pages = pl.pallas_call(
        functools.partial(
            _kernel, tokens=tokens, q_heads=num_q_heads, kv_heads=num_kv_heads, group=group, eps=eps
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((tile, width), lambda i, *_: (i, 0)),
                pl.BlockSpec((tile, dim), lambda i, *_: (i, 0)),
                *[vector] * len(norms),
                pool,
                pool,
            ],
            out_specs=[pl.BlockSpec((tile, q_width), lambda i, *_: (i, 0)), pool, pool],
            scratch_shapes=[rows, rows, groups, groups, pltpu.SemaphoreType.DMA],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, q_width), qkv.dtype),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases={4 + len(norms): 1, 5 + len(norms): 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name="rope_cache",
    )(
        slots,
        _first_of_group(slots // group, tile),
        qkv,
        rope.at[positions].get(mode="promise_in_bounds"),
        *norms,
        k_pages,
        v_pages,
    )
    return q.reshape(tokens, num_q_heads, dim), as_stored(k_pages, dim), as_stored(v_pages, dim)


def _first_of_group(groups, tile):
    """For each token the first one of its tile, counted within the tile, that writes to the same group."""
    groups = jnp.pad(groups, (0, -groups.shape[0] % tile), constant_values=-1).reshape(-1, tile)
    same = groups[:, :, None] == groups[:, None, :]
    return jnp.argmax(same, axis=2).astype(jnp.int32).reshape(-1)


def _kernel(slots_ref, first_ref, qkv_ref, angles_ref, *refs, tokens, q_heads, kv_heads, group, eps):
    *norm_refs, _, _, q_ref, k_hbm, v_hbm, k_rows, v_rows, k_groups, v_groups, done = refs
    tile, dim = angles_ref.shape
    transposed = lies_transposed(dim)
    begin = pl.program_id(0) * tile
    count = jnp.minimum(tokens - begin, tile)
    pools = (k_hbm, k_rows, k_groups), (v_hbm, v_rows, v_groups)

    def copies(token):
        """(cache, buffer) of the group that a token writes to, for keys and for values."""
        slot = slots_ref[begin + token]
        start = pl.multiple_of(slot % LANES // group * group, group)
        keys = () if transposed else (slice(None), pl.ds(start, group))
        return [(hbm.at[slot // LANES, *keys], groups.at[token]) for hbm, _, groups in pools]

    def each_group(visit):
        def token(t, _):
            @pl.when(first_ref[begin + t] == t)
            def _():
                for cache, buffer in copies(t):
                    visit(cache, buffer)

        lax.fori_loop(0, count, token, None)

    each_group(lambda cache, buffer: pltpu.make_async_copy(cache, buffer, done).start())

    cos, sin = angles_ref[:, : dim // 2], angles_ref[:, dim // 2 :]
    for head in range(q_heads + 2 * kv_heads):
        x = qkv_ref[:, head * dim : (head + 1) * dim].astype(jnp.float32)
        if head < q_heads + kv_heads:
            if norm_refs:
                total = jnp.sum(x * x, axis=1, keepdims=True)
                inverse = lax.rsqrt((total + dim * eps) * (1.0 / dim))
                x = (x * inverse) * norm_refs[head >= q_heads][...]
            a, b = x[:, : dim // 2], x[:, dim // 2 :]
            x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
        if head < q_heads:
            q_ref[:, head * dim : (head + 1) * dim] = x.astype(q_ref.dtype)
            continue
        if transposed:  # token t becomes column t
            x = jnp.concatenate([x, jnp.zeros((LANES - tile, dim), jnp.float32)], axis=0).T
        (k_rows if head < q_heads + kv_heads else v_rows)[(head - q_heads) % kv_heads] = x

    each_group(lambda cache, buffer: pltpu.make_async_copy(cache, buffer, done).wait())

    key = lax.broadcasted_iota(jnp.int32, k_groups.shape[1:], 2 if transposed else 1)

    def put(t, _):
        to, offset = first_ref[begin + t], slots_ref[begin + t] % group
        for _, rows, groups in pools:
            new = pltpu.roll(rows[...], (offset - t) % LANES, 2) if transposed else rows[:, pl.ds(t, 1)]
            old = groups[to].astype(jnp.float32)  # 16-bit values can't be addressed row by row
            groups[to] = jnp.where(key == offset, new, old).astype(groups.dtype)

    lax.fori_loop(0, count, put, None)
    each_group(lambda cache, buffer: pltpu.make_async_copy(buffer, cache, done).start())
    each_group(lambda cache, buffer: pltpu.make_async_copy(buffer, cache, done).wait())
