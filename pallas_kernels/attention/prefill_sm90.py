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
from pallas_kernels.attention.query_tiles_sm90 import QueryTiles, chunk_of, to_rows, to_tiles
from pallas_kernels.attention.segments_sm90 import BLOCK, SEGMENT
from pallas_kernels.compat import interpreting, pl, plgpu

STAGES = 2


def prefill(q, k_pages, v_pages, tables, tiles: QueryTiles, **options):
    """q [T, Hq, D] of sequences one after the other → [T, Hq, D]; rows of no sequence are zero."""
    return _prefill(q, k_pages, v_pages, tables, tiles, with_lse=False, **options)[0]


def prefill_saving(q, k_pages, v_pages, tables, tiles: QueryTiles, **options):
    """What `prefill` gives, and for its gradient (q and the result in tile space, log-sum-exp [Hq, size]).

    The log-sum-exp of a row is M + log2 L, of the row's scores in log2 units; zero where there is no query.
    """
    return _prefill(q, k_pages, v_pages, tables, tiles, with_lse=True, **options)


def _prefill(q, k_pages, v_pages, tables, tiles, *, with_lse, scale, window, soft_cap):
    tokens, _, dim = q.shape
    q = to_tiles(q, tiles)
    call = _kernel(
        q.shape, k_pages.shape, tiles.shape, q.dtype, scale, window, soft_cap, with_lse, interpreting()
    )
    k_pages, v_pages = (p.reshape(*p.shape[:2], -1, BLOCK[dim], dim) for p in (k_pages, v_pages))
    numbers = tiles.sequence, tiles.place, tiles.position, tiles.keys, tiles.queries
    out, *lse = call(q, k_pages, v_pages, tables, *numbers)
    return to_rows(out, tiles, tokens), (q, out, *lse)


@functools.cache
def _kernel(shape, pool, tiles, dtype, scale, window, soft_cap, with_lse, _interpreting):
    (size, heads, dim), (_, kv_heads, page, _) = shape, pool
    tile, count, sequences, in_rows = tiles
    keys, group = BLOCK[dim], heads // kv_heads
    split = tile == softmax.ROWS
    out_dim = dim // 2 if split else dim
    per_page, per_segment = page // keys, SEGMENT // keys
    c = softmax.factor(scale, soft_cap)

    def body(q_g, k_g, v_g, tables_g, owner_g, place_g, position_g, live_g, queries_g, out_g, *lse_g):
        def scoped(q_s, k_s, v_s, k_full, v_full, q_full, k_free, v_free, turn, *out_s):
            head, warpgroup = lax.axis_index("head"), lax.axis_index("wg")
            at = count - 1 - lax.axis_index("tile")  # long rows first
            sequence, position, length = owner_g[at], position_g[at], live_g[at]
            last = pl.cdiv(jnp.minimum(position + tile, length), jnp.int32(keys))
            first = jnp.int32(0)
            if window is not None:
                first = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(keys))
            mine = 0 if split else warpgroup  # this warpgroup's chunk of the tile
            surplus = in_rows & (sequence == sequences - 1)
            rows, queries, written = chunk_of(place_g[at], queries_g[at], mine, size, surplus)
            taken = q_s.at[mine]

            def write(result, best, total):
                row = plgpu.broadcasted_iota(jnp.int32, result.shape, 0, layout=softmax.TILE)
                result = jnp.where(row < queries, result, 0.0)
                staged = out_s[0].at[warpgroup] if split else taken
                staged[...] = result.astype(dtype)
                plgpu.commit_smem()

                @pl.when(written)
                def _():
                    columns = (pl.ds(warpgroup * out_dim, out_dim),) if split else ()
                    plgpu.copy_smem_to_gmem(staged, out_g.at[(rows, head, *columns)])
                    plgpu.wait_smem_to_gmem(0)

                if with_lse:

                    @pl.when(written & ((warpgroup == 0) | (not split)))
                    def _():
                        row = plgpu.broadcasted_iota(jnp.int32, total.shape, 0, layout=softmax.ROW)
                        lse = softmax.log_sum_exp(best, total)
                        lse_g[0].at[head, rows][...] = jnp.where(row < queries, lse, 0.0)

            def take_turn():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            @pl.when((warpgroup < 2) & (length > 0))
            def _compute():
                plgpu.set_max_registers(240, action="increase")
                base = position + mine * softmax.ROWS
                end = pl.cdiv(jnp.minimum(base + softmax.ROWS, length), jnp.int32(keys))
                end = jnp.clip(end, first + 1, last)
                if split:

                    @pl.when(warpgroup == 0)
                    def _():
                        plgpu.copy_gmem_to_smem(q_g.at[rows, head], taken, q_full.at[0])
                else:
                    plgpu.copy_gmem_to_smem(q_g.at[rows, head], taken, q_full.at[mine])
                plgpu.barrier_wait(q_full.at[mine])
                plgpu.barrier_wait(k_full.at[0])
                pl.when(warpgroup == 1)(take_turn)

                def each_block(j, state, edge):
                    out, best, total, acc, m, mass = state
                    slot = lax.rem(j - first, jnp.int32(STAGES))

                    def product(ref):
                        plgpu.wgmma(ref, taken, k_s.at[slot].transpose((1, 0)))
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
                    p, alpha, m, mass = softmax.block(scores, m, mass, c, dtype)
                    acc = acc * softmax.spread(alpha, out_dim)
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
                out, best, total = softmax.merge(*state)

                def pass_by(j, _):  # keeps step with the other warpgroup
                    slot = lax.rem(j - first, jnp.int32(STAGES))
                    plgpu.barrier_arrive(k_free.at[slot])
                    plgpu.barrier_arrive(v_free.at[slot])
                    take_turn()
                    take_turn()
                    return ()

                lax.fori_loop(end, last, pass_by, ())
                pl.when(warpgroup == 0)(take_turn)
                write(softmax.finish(out, total, jnp.float32), best, total)

            @pl.when((warpgroup < 2) & (length == 0))
            def _clear():
                write(*softmax.empty(out_dim))

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
        half = plgpu.SMEM((2, softmax.ROWS, out_dim), dtype, transforms=softmax.swizzled(out_dim))
        ring = plgpu.SMEM((STAGES, keys, dim), dtype, transforms=swizzle)
        pl.run_scoped(
            scoped,
            plgpu.SMEM((1 if split else 2, softmax.ROWS, dim), dtype, transforms=swizzle),
            ring,
            ring,
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            *([half] if split else []),
            collective_axes="wg",
        )

    outputs = [jax.ShapeDtypeStruct((size, heads, dim), dtype)]
    if with_lse:
        outputs.append(jax.ShapeDtypeStruct((heads, size), jnp.float32))
    return plgpu.kernel(
        body,
        kernel_name="attention_prefill",
        out_type=outputs,
        grid=(heads, count),
        grid_names=("head", "tile"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
