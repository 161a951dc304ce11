"""Prefill attention on Hopper: tiles of 128 queries of one head, two warpgroups in ping-pong, one that loads.

A tile walks over its keys in one flat loop of blocks; where a segment begins, the state is merged and emptied
inside the softmax phase, which costs no spills. With head_dim 256 a tile has 64 queries: both warpgroups
compute the same scores, each its half of the output columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import online_softmax_sm90 as softmax
from pallas_kernels.attention.segments_sm90 import BLOCK, SEGMENT
from pallas_kernels.compat import interpreting, pl, plgpu

STAGES = 2


def prefill(q, k_pages, v_pages, tables, query_start, lens, *, scale, window, soft_cap):
    """q [T, Hq, D] of sequences one after the other → [T, Hq, D]."""
    tokens, _, dim = q.shape
    sequences = lens.shape[0]
    tile = softmax.ROWS if dim > 128 else 2 * softmax.ROWS
    count = -(-tokens // tile) + (sequences - 1 if sequences > 1 else 0)
    owner, start = _tiles(query_start, tile, count)
    length = query_start[1:] - query_start[:-1]
    if sequences > 1:  # TMA wants each tile to start at a multiple of 8 rows
        rows = (query_start[owner] + start)[:, None] + jnp.arange(tile, dtype=jnp.int32)
        q = q.at[jnp.minimum(rows.reshape(-1), tokens - 1)].get(mode="promise_in_bounds")
    elif tokens % tile:
        q = jnp.pad(q, ((0, -tokens % tile), (0, 0), (0, 0)))
    live = jnp.where(start < length[owner], lens[owner], 0)
    position = lens[owner] - length[owner] + start
    shape = q.shape, k_pages.shape, tables.shape, count
    call = _kernel(shape, q.dtype, scale, window, soft_cap, interpreting())
    k_pages, v_pages = (p.reshape(*p.shape[:2], -1, BLOCK[dim], dim) for p in (k_pages, v_pages))
    out = call(q, k_pages, v_pages, tables, owner, position, live)
    if sequences == 1:
        return out[:tokens] if out.shape[0] != tokens else out
    # Back from tiles to rows: row t of sequence s sits in tile (first tile of s) + t // tile.
    at = jnp.arange(tokens, dtype=jnp.int32)
    sequence = jnp.minimum(jnp.sum(at[:, None] >= query_start[None, 1:], axis=1), sequences - 1)
    tiles = -(-length // tile)
    where = (jnp.cumsum(tiles) - tiles)[sequence] * tile + at - query_start[sequence]
    return out.at[jnp.clip(where, 0, out.shape[0] - 1)].get(mode="promise_in_bounds")


def _tiles(query_start, tile, count):
    """(sequence, first query) of every tile; surplus tiles start past the end of the last sequence."""
    ends = jnp.cumsum(-(-(query_start[1:] - query_start[:-1]) // tile)).astype(jnp.int32)
    index = jnp.arange(count, dtype=jnp.int32)
    owner = jnp.sum(index[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, ends.shape[0] - 1)
    begin = jnp.where(owner > 0, ends[jnp.maximum(owner - 1, 0)], 0)
    return owner, (index - begin) * tile


@functools.cache
def _kernel(shape, dtype, scale, window, soft_cap, _interpreting):
    (_, heads, dim), (_, kv_heads, page, _), _, count = shape
    keys, group = BLOCK[dim], heads // kv_heads
    split = dim > 128
    tile, out_dim = (softmax.ROWS, dim // 2) if split else (2 * softmax.ROWS, dim)
    per_page, per_segment = page // keys, SEGMENT // keys
    c = softmax.factor(scale, soft_cap)

    def body(q_g, k_g, v_g, tables_g, owner_g, position_g, live_g, out_g):
        def scoped(q_s, k_s, v_s, k_full, v_full, q_full, k_free, v_free, turn, *out_s):
            head, warpgroup = lax.axis_index("head"), lax.axis_index("wg")
            at = count - 1 - lax.axis_index("tile")  # long rows first
            sequence, position, length = owner_g[at], position_g[at], live_g[at]
            last = pl.cdiv(jnp.minimum(position + tile, length), jnp.int32(keys))
            first = jnp.int32(0)
            if window is not None:
                first = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(keys))

            def take_turn():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            @pl.when((warpgroup < 2) & (length > 0))
            def _compute():
                plgpu.set_max_registers(240, action="increase")
                mine = 0 if split else warpgroup
                base = position + mine * softmax.ROWS
                end = pl.cdiv(jnp.minimum(base + softmax.ROWS, length), jnp.int32(keys))
                end = jnp.clip(end, first + 1, last)
                queries = q_s.at[mine]
                rows = pl.ds(at * tile if split else at * tile + warpgroup * softmax.ROWS, softmax.ROWS)
                if split:

                    @pl.when(warpgroup == 0)
                    def _():
                        plgpu.copy_gmem_to_smem(q_g.at[rows, head], queries, q_full.at[0])
                else:
                    plgpu.copy_gmem_to_smem(q_g.at[rows, head], queries, q_full.at[mine])
                plgpu.barrier_wait(q_full.at[mine])
                plgpu.barrier_wait(k_full.at[0])
                pl.when(warpgroup == 1)(take_turn)

                def each_block(j, state, edge):
                    out, best, total, acc, m, mass = state
                    slot = lax.rem(j - first, jnp.int32(STAGES))

                    def product(ref):
                        plgpu.wgmma(ref, queries, k_s.at[slot].transpose((1, 0)))
                        take_turn()
                        return ref[...]

                    scores = pl.run_scoped(product, plgpu.ACC((softmax.ROWS, keys), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[slot])
                    scores = softmax.cap(scores, scale, soft_cap)
                    if edge:
                        row = plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS, keys), 0, layout=softmax.TILE)
                        key = plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS, keys), 1, layout=softmax.TILE)
                        scores = softmax.mask(scores, row + jnp.minimum(base, length), key + j * keys, window)
                        scores = jnp.where(key + j * keys < length, scores, -jnp.inf)
                    out, best, total, acc, m, mass = lax.cond(
                        lax.rem(j, jnp.int32(per_segment)) == 0,
                        lambda *s: (*softmax.merge(*s), *softmax.empty(out_dim)),
                        lambda *s: s,
                        *(out, best, total, acc, m, mass),
                    )
                    p, acc, m, mass = softmax.block(scores, acc, m, mass, c, dtype)
                    acc, mass, m, p = lax.optimization_barrier((acc, mass, m, p))
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(turn)
                    values = v_s.at[slot]
                    if edge:
                        softmax.clear_tail(values, length - j * keys)
                    if split:
                        values = values.at[:, pl.ds(warpgroup * out_dim, out_dim)]

                    more, next_slot = j + 1 < end, lax.rem(j + 1 - first, jnp.int32(STAGES))

                    def next_keys():
                        pl.when(more)(lambda: plgpu.barrier_wait(k_full.at[next_slot]))

                    acc = softmax.accumulate(acc, p, values, next_keys)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return out, best, total, acc, m, mass

                state = (*softmax.empty(out_dim), *softmax.empty(out_dim))
                whole = first
                if window is None:
                    # All rows see these blocks, and the sequence fills them.
                    whole = jnp.minimum(lax.div(base + 1, jnp.int32(keys)), lax.div(length, jnp.int32(keys)))
                    whole = jnp.minimum(whole, end)
                    state = lax.fori_loop(first, whole, functools.partial(each_block, edge=False), state)
                state = lax.fori_loop(whole, end, functools.partial(each_block, edge=True), state)
                out, _, total = softmax.merge(*state)

                def pass_by(j, _):  # keeps step with the other warpgroup
                    slot = lax.rem(j - first, jnp.int32(STAGES))
                    plgpu.barrier_arrive(k_free.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    take_turn()
                    take_turn()
                    return ()

                lax.fori_loop(end, last, pass_by, ())
                pl.when(warpgroup == 0)(take_turn)
                result = out_s[0].at[warpgroup] if split else queries
                result[...] = softmax.finish(out, total, dtype)
                plgpu.commit_smem()
                where = (rows, head, pl.ds(warpgroup * out_dim, out_dim)) if split else (rows, head)
                plgpu.copy_smem_to_gmem(result, out_g.at[where])
                plgpu.wait_smem_to_gmem(0)

            @pl.when((warpgroup == 2) & (length > 0))
            def _load():
                plgpu.set_max_registers(24, action="decrease")
                kv_head = lax.div(head, jnp.int32(group))

                def each_block(j, _):
                    slot = lax.rem(j - first, jnp.int32(STAGES))
                    index = tables_g[sequence, lax.div(j, jnp.int32(per_page))]
                    where = index, kv_head, lax.rem(j, jnp.int32(per_page))
                    again = j - first >= STAGES
                    pl.when(again)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_g.at[where], k_s.at[slot], k_full.at[slot])
                    pl.when(again)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_g.at[where], v_s.at[slot], v_full.at[slot])
                    return ()

                def drain(j, _):
                    slot = lax.rem(j - first, jnp.int32(STAGES))
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])
                    return ()

                lax.fori_loop(first, last, each_block, ())
                lax.fori_loop(jnp.maximum(first, last - STAGES), last, drain, ())

        swizzle = softmax.swizzled(dim)
        results = [plgpu.SMEM((2, softmax.ROWS, out_dim), dtype, transforms=swizzle)] if split else []
        tiles = plgpu.SMEM((STAGES, keys, dim), dtype, transforms=swizzle)
        pl.run_scoped(
            scoped,
            plgpu.SMEM((1 if split else 2, softmax.ROWS, dim), dtype, transforms=swizzle),
            tiles,
            tiles,
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            *results,
            collective_axes="wg",
        )

    return plgpu.kernel(
        body,
        kernel_name="attention_prefill",
        out_type=jax.ShapeDtypeStruct((count * tile, heads, dim), dtype),
        grid=(heads, count),
        grid_names=("head", "tile"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
