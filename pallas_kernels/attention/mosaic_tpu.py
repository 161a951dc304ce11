"""Paged attention on TPUs: one kernel for decode, prefill and chunks.

The queries of one sequence are cut into sub-tiles of `sub_tile(group)` rows (tokens × the query heads of a KV head).
A page of 128 keys is a segment, and `_segment` is all the arithmetic there is: a sub-tile against a page, from an empty
state, merged into (M, L, O). Its shapes are a function of the model alone; a decode step fills its rows up with
zeros, in VMEM. Sub-tiles meet pages in ascending order. How many sub-tiles share a fetched page touches no bit.

Two pages for keys and two for values lie in VMEM: while one is worked on, the next one, of the next tile where need be,
is on its way. Page numbers come from the block table in scalar memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.arrays import round_up
from pallas_kernels.attention.segment_tpu import MAX_HEAD_DIM, ROWS_MULTIPLE, finish, segment, sub_tile
from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tiles_tpu import LANES, VMEM_LIMIT, in_hbm, lies_transposed, require_dtype

MOST_SUB_TILES = 8
MOST_ROWS = 4096
"""Rows of all KV heads and sub-tiles that share a page, at most."""

NOWHERE = -(2**30)
"""The position of what is no query: it sees no key."""


def attention(
    q, k_pages, v_pages, block_tables, query_start, seq_lens, *, scale, window, soft_cap, max_query_len
):
    """See `op.attention`; float32 or bfloat16, head_dim up to 256, pages of 128 keys.

    With `max_query_len=1`, row s of `q` is the query of sequence s.
    """
    require_dtype("attention: q", q.dtype)
    if {k_pages.dtype, v_pages.dtype} != {q.dtype}:
        raise ValueError(f"attention: q is {q.dtype} but the cache {k_pages.dtype}; use one dtype")
    tokens, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    if page != LANES or dim > MAX_HEAD_DIM:
        raise ValueError(
            f"attention: pages of {page} keys, head_dim={dim}; mosaic_tpu takes pages of {LANES} and head_dim "
            f"up to {MAX_HEAD_DIM}; use backend='xla'"
        )
    group = heads // kv_heads
    queries, rows = sub_tile(group)
    subs = max(1, min(MOST_SUB_TILES, MOST_ROWS // (kv_heads * rows), pl.cdiv(max_query_len, queries)))
    query_start, seq_lens = jnp.asarray(query_start), jnp.asarray(seq_lens)
    if max_query_len == 1:
        queries = subs = 1
        owner = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
        first = seq_lens - 1
        picked = q.reshape(tokens, 1, kv_heads, 1, group, dim)
    else:
        owner, first, gathered, where = _tiles(query_start, seq_lens, tokens, subs * queries)
        picked = q.reshape(tokens, -1).at[gathered].get(mode="promise_in_bounds")
        picked = picked.reshape(-1, subs, queries, kv_heads, group, dim).transpose(0, 1, 3, 2, 4, 5)
        picked = picked.reshape(-1, subs, kv_heads, 1, queries * group, dim)
    tiles = first.shape[0]
    picked = picked.reshape(tiles, subs, kv_heads, queries * group, dim)
    filled = round_up(queries * group, ROWS_MULTIPLE)
    picked = jnp.pad(picked, ((0, 0),) * 3 + ((0, filled - queries * group), (0, 0)))
    # The token, within its sub-tile, of every row; alike in all lanes, as a mask of scores wants it.
    token = np.arange(rows) // group
    token = np.where(np.arange(rows) < queries * group, token, NOWHERE).astype(np.int32)
    lens = seq_lens[owner]
    last = jnp.minimum(first + subs * queries, lens) - 1
    end = jnp.maximum(last // page, 0) + 1
    begin = jnp.zeros_like(end)
    if window is not None:
        begin = jnp.minimum(jnp.maximum(first - window + 1, 0) // page, end - 1)
    out = _launch(
        (jnp.asarray(block_tables), owner, first, lens, begin, end),
        picked,
        np.repeat(token[:, None], LANES, axis=1),
        in_hbm(k_pages, dim),
        in_hbm(v_pages, dim),
        queries=queries,
        options={"scale": scale, "window": window, "soft_cap": soft_cap},
    )[:, :, :, : queries * group]
    if max_query_len == 1:
        return out.reshape(tokens, heads, dim)
    out = out.reshape(tiles, subs, kv_heads, queries, group, dim).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(-1, heads * dim).at[where].get(mode="promise_in_bounds").reshape(tokens, heads, dim)


def _tiles(query_start, seq_lens, tokens, size):
    """Cuts the queries into tiles of `size`, each of one sequence; as many as any batch of `tokens` may need.

    Returns:
        per tile: its sequence and the position of its first query, NOWHERE for surplus tiles; the row of q of every
        place in a tile; the place of every row of q.
    """
    lengths = query_start[1:] - query_start[:-1]
    sequences = lengths.shape[0]
    ends = jnp.cumsum(-(-lengths // size))
    starts = ends - -(-lengths // size)
    index = jnp.arange(tokens // size + sequences, dtype=jnp.int32)
    owner = jnp.sum(index[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    surplus = owner == sequences
    owner = jnp.minimum(owner, sequences - 1)
    offset = (index - starts[owner]) * size
    first = jnp.where(surplus, NOWHERE, (seq_lens - lengths)[owner] + offset)
    gathered = (query_start[owner] + offset)[:, None] + jnp.arange(size, dtype=jnp.int32)
    row = jnp.arange(tokens, dtype=jnp.int32)
    of = jnp.minimum(jnp.sum(row[:, None] >= query_start[None, 1:], axis=1, dtype=jnp.int32), sequences - 1)
    where = starts[of] * size + row - query_start[of]
    most = index.shape[0] * size - 1
    return owner, first, jnp.clip(gathered, 0, tokens - 1).reshape(-1), jnp.clip(where, 0, most)


def _launch(scalars, q, token, k_pages, v_pages, *, queries, options):
    tiles, subs, kv_heads, filled, dim = q.shape
    rows = token.shape[0]
    block = pl.BlockSpec((1, subs, kv_heads, filled, dim), lambda i, *_: (i, 0, 0, 0, 0))
    pool = pl.BlockSpec(memory_space=pltpu.HBM)
    pages = pltpu.VMEM((2, *k_pages.shape[1:]), k_pages.dtype)
    statistic = pltpu.VMEM((subs, kv_heads, rows, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, queries=queries, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(tiles,),
            in_specs=[block, pl.BlockSpec((rows, LANES), lambda i, *_: (0, 0)), pool, pool],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((subs, kv_heads, rows, dim), q.dtype),
                statistic,
                statistic,
                pltpu.VMEM((subs, kv_heads, rows, dim), jnp.float32),
                pages,
                pages,
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name="attention",
    )(*scalars, q, token, k_pages, v_pages)


def _kernel(
    tables_ref,
    owner_ref,
    first_ref,
    lens_ref,
    begin_ref,
    end_ref,
    q_ref,
    token_ref,
    k_hbm,
    v_hbm,
    out_ref,
    q_rows,
    best_ref,
    total_ref,
    sum_ref,
    k_pages,
    v_pages,
    arrived,
    turn,
    *,
    queries,
    options,
):
    tile, tiles = pl.program_id(0), pl.num_programs(0)
    subs, _, filled, dim = q_ref.shape[1:]
    key_axis = 2 if lies_transposed(dim) else 1
    first, begin, end = first_ref[tile], begin_ref[tile], end_ref[tile]

    def copies(of_tile, index, slot):
        number = tables_ref[owner_ref[of_tile], index]
        return [
            pltpu.make_async_copy(hbm.at[number], buffer.at[slot], arrived.at[slot])
            for hbm, buffer in ((k_hbm, k_pages), (v_hbm, v_pages))
        ]

    @pl.when(tile == 0)
    def _():
        turn[0] = 0
        for copy in copies(0, begin, 0):
            copy.start()

    def clear(sub, _):
        q_rows[sub, :, :filled] = q_ref[0, sub]
        if filled < q_rows.shape[2]:
            q_rows[sub, :, filled:] = jnp.zeros_like(q_rows[sub, :, filled:])
        best_ref[sub] = jnp.full_like(best_ref[sub], jnp.finfo(jnp.float32).min)
        total_ref[sub] = jnp.zeros_like(total_ref[sub])
        sum_ref[sub] = jnp.zeros_like(sum_ref[sub])

    lax.fori_loop(0, subs, clear, None)

    def page(index, slot):
        following = jnp.minimum(tile + 1, tiles - 1)
        ends = index + 1 == end
        then = jnp.where(ends, following, tile), jnp.where(ends, begin_ref[following], index + 1)

        @pl.when(jnp.logical_not(ends) | (tile + 1 < tiles))
        def _():
            for copy in copies(*then, 1 - slot):
                copy.start()

        for copy in copies(tile, index, slot):
            copy.wait()
        live = lens_ref[tile] - index * LANES

        @pl.when(live < LANES)
        def _():  # whatever the page held before: 0 · NaN must not happen
            values = v_pages[slot].astype(jnp.float32)
            key = lax.broadcasted_iota(jnp.int32, values.shape, key_axis)
            v_pages[slot] = jnp.where(key < live, values, 0.0).astype(v_pages.dtype)

        def against(sub, _):
            start = first + sub * queries
            seen = index * LANES < start + queries
            if options["window"] is not None:
                seen &= (index + 1) * LANES > start - options["window"] + 1

            @pl.when(seen)
            def _():
                state = best_ref[sub, :, :, :1], total_ref[sub, :, :, :1], sum_ref[sub]
                best, total, out = segment(
                    q_rows[sub],
                    k_pages[slot],
                    v_pages[slot],
                    start + token_ref[...],
                    index * LANES,
                    state,
                    **options,
                )
                best_ref[sub] = jnp.broadcast_to(best, best_ref.shape[1:])
                total_ref[sub] = jnp.broadcast_to(total, total_ref.shape[1:])
                sum_ref[sub] = out

        lax.fori_loop(0, subs, against, None)
        return 1 - slot

    turn[0] = lax.fori_loop(begin, end, page, turn[0])

    def write(sub, _):
        out = finish(sum_ref[sub, :, :filled], total_ref[sub, :, :filled, :1])
        out_ref[0, sub] = out.astype(out_ref.dtype)

    lax.fori_loop(0, subs, write, None)
