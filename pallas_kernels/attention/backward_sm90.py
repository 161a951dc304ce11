"""Attention's gradient on Hopper, as in FlashAttention-2 (Dao 2023), in two kernels and without atomics.

Scores are in log2 units as in the forward (`online_softmax_sm90`): s = q·k through the soft-cap, c = `softmax.factor`.

The forward pass under differentiation keeps its result and each row's L, the log-sum-exp of s · c over its segments.

`_queries`, 64 queries of one head a warpgroup, blocks of KEYS keys ascending:

    δ = Σ do · out;  p = 2^fma(s, c, −L);  dp = do·v;  ds = p · (dp − δ), times 1 − tanh² under a soft-cap
    dq += round(ds) · k

where Σ adds up columns that are alike modulo `softmax.columns`, ascending, and then those in `reduce_columns`' tree.

`_keys`, 64 keys a warpgroup, chunks of 64 queries ascending, in a chunk the query heads of the KV head ascending, with
p and ds computed again: dv += round(p)ᵀ · do and dk += round(ds)ᵀ · q. Pages that sequences share sum those in
ascending order. All sums are float32 accumulators of wgmma; dq and dk are multiplied by `scale` and rounded at the end.

What a query doesn't see adds exact zeros, so where a loop begins and ends touches no bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import online_softmax_sm90 as softmax
from pallas_kernels.attention.query_tiles_sm90 import chunk_of, to_rows, to_tiles
from pallas_kernels.compat import drain, fused_multiply_add, interpreting, pl, plgpu, reduce_columns

KEYS = 64
STAGES = 2
PER_QUERY = plgpu.Layout.WGMMA.reduce(0)


def forward(
    kernel, q, k_pages, v_pages, block_tables, query_start, seq_lens, tiles, *, max_query_len, **options
):
    """(attention's result, what `attention` here wants of it), by one way whatever `max_query_len` is."""
    operands = q, k_pages, v_pages, block_tables, query_start, seq_lens
    return kernel.attention_saving(*operands, **options, tiles=tiles)


def attention(
    q, k_pages, v_pages, block_tables, query_start, seq_lens, saved, d_out, *, scale, window, soft_cap
):
    """(dq, dk, dv) in the dtypes and shapes of q, k_pages and v_pages; what no sequence has is zero.

    A sequence's keys and values must be finite, as in the forward. `saved` is what `attention_saving` kept.
    """
    tiles, owners, in_tiles, out, lse = saved
    pages, kv_heads, page, dim = k_pages.shape
    d_out = to_tiles(d_out, tiles)
    options = scale, window, soft_cap, interpreting()
    blocks = (p.reshape(pages, kv_heads, -1, KEYS, dim) for p in (k_pages, v_pages))
    numbers = tiles.sequence, tiles.place, tiles.position, tiles.keys, tiles.queries
    call = _queries(out.shape, (kv_heads, page), tiles.shape, q.dtype, *options)
    dq, delta = call(in_tiles, d_out, out, lse, *blocks, block_tables, *numbers)
    call = _keys(out.shape, k_pages.shape, tiles.tile, q.dtype, *options)
    numbers = (getattr(owners, field.name) for field in dataclasses.fields(owners))
    dk, dv = call(in_tiles, d_out, lse, delta, k_pages, v_pages, *numbers)
    return to_rows(dq, tiles, q.shape[0]), dk, dv


def _slope(score, soft_cap):
    """What ds is multiplied by besides `scale`: 1 − tanh² of the capped score."""
    one = softmax.full(score.shape, 1.0, softmax.TILE)
    return one if soft_cap is None else fused_multiply_add(-score, score, one, softmax.TILE)


def _iota(axis: int):
    return plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS, KEYS), axis, layout=softmax.TILE)


def _seen(query, key, live, window):
    """Whether a query sees a key; both count from the same key, of which `live` exist."""
    seen = (query >= key) & (key < live)
    return seen if window is None else seen & (key + window > query)


def _products(left, right, other_left, other_right):
    """(left · rightᵀ, other_left · other_rightᵀ), of 64 rows and columns each."""

    def multiply(one, other):
        plgpu.wgmma(one, left, right.transpose((1, 0)))
        plgpu.wgmma(other, other_left, other_right.transpose((1, 0)))
        return one[...], other[...]

    shape = plgpu.ACC((softmax.ROWS, KEYS), jnp.float32)
    return pl.run_scoped(multiply, shape, shape)


@functools.cache
def _queries(shape, pool, tiles, dtype, scale, window, soft_cap, _interpreting):
    (size, heads, dim), (kv_heads, page), (tile, count, sequences, in_rows) = shape, pool, tiles
    groups, group, per_page = tile // softmax.ROWS, heads // kv_heads, page // KEYS
    c = softmax.factor(scale, soft_cap)

    def body(q_g, do_g, out_g, lse_g, k_g, v_g, tables_g, *rest):
        owner_g, place_g, position_g, live_g, queries_g, dq_g, delta_g = rest

        def scoped(q_s, do_s, out_s, k_s, v_s, loaded, full, free):
            head, warpgroup = lax.axis_index("head"), lax.axis_index("wg")
            at = count - 1 - lax.axis_index("tile")  # long rows first
            sequence, position, length = owner_g[at], position_g[at], live_g[at]
            last = pl.cdiv(jnp.minimum(position + tile, length), jnp.int32(KEYS))
            first = jnp.int32(0)
            if window is not None:
                first = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(KEYS))
            blocks = last - first
            surplus = in_rows & (sequence == sequences - 1)
            rows, queries, written = chunk_of(place_g[at], queries_g[at], warpgroup, size, surplus)

            def write(dq, delta):
                row = plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS, dim), 0, layout=softmax.TILE)
                staged = q_s.at[warpgroup]
                staged[...] = jnp.where(row < queries, dq * scale, 0.0).astype(dtype)
                plgpu.commit_smem()

                @pl.when(written)
                def _():
                    delta_g.at[head, rows][...] = delta
                    plgpu.copy_smem_to_gmem(staged, dq_g.at[rows, head])
                    plgpu.wait_smem_to_gmem(0)

            @pl.when((warpgroup < groups) & (length > 0))
            def _compute():
                if groups > 1:
                    plgpu.set_max_registers(240, action="increase")
                held = [x.at[warpgroup] for x in (q_s, do_s, out_s)]
                for source, target in zip((q_g, do_g, out_g), held, strict=True):
                    plgpu.copy_gmem_to_smem(source.at[rows, head], target, loaded.at[warpgroup])
                plgpu.barrier_wait(loaded.at[warpgroup])
                q, d_out, out = held
                row = plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS,), 0, layout=softmax.ROW)
                delta = jnp.where(row < queries, _sum_of_products(d_out, out), 0.0)
                lse = plgpu.load(lse_g.at[head, rows], layout=softmax.ROW, optimized=False)
                spread_lse, spread_delta = (softmax.spread(x, KEYS) for x in (lse, delta))
                base = position + warpgroup * softmax.ROWS

                def meet(i, dq):
                    slot, start = lax.rem(i, jnp.int32(STAGES)), (first + i) * KEYS
                    keys, values = k_s.at[slot], v_s.at[slot]
                    plgpu.barrier_wait(full.at[slot])
                    scores, dp = _products(q, keys, d_out, values)
                    scores = softmax.cap(scores, scale, soft_cap)
                    ds = _exponentials(scores, c, spread_lse) * (dp - spread_delta) * _slope(scores, soft_cap)
                    whole = start + KEYS <= jnp.minimum(base + 1, length)
                    if window is not None:
                        whole &= start + window >= base + softmax.ROWS

                    def mask(ds):
                        seen = _seen(_iota(0) + (base - start), _iota(1), length - start, window)
                        return jnp.where(seen, ds, 0.0)

                    ds = lax.cond(whole, lambda ds: ds, mask, ds)
                    softmax.clear_tail(keys, length - start)
                    dq = softmax.accumulate(dq, ds.astype(dtype), keys)
                    plgpu.barrier_arrive(free.at[slot])
                    return dq

                zeros = softmax.full((softmax.ROWS, dim), 0, softmax.TILE)
                write(lax.fori_loop(0, blocks, meet, zeros), delta)

            @pl.when((warpgroup < groups) & (length == 0))
            def _clear():
                dq, _, delta = softmax.empty(dim)
                write(dq, delta)

            @pl.when((warpgroup == groups) & (length > 0))
            def _load():
                if groups > 1:
                    plgpu.set_max_registers(24, action="decrease")
                kv_head = lax.div(head, jnp.int32(group))

                def each_block(step, _):
                    slot, j = lax.rem(step, jnp.int32(STAGES)), first + step
                    where = tables_g[sequence, lax.div(j, jnp.int32(per_page))], kv_head
                    where = *where, lax.rem(j, jnp.int32(per_page))
                    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_g.at[where], k_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(v_g.at[where], v_s.at[slot], full.at[slot])
                    return ()

                lax.fori_loop(0, blocks, each_block, ())
                drain(free, STAGES, blocks)

        swizzle = softmax.swizzled(dim)
        held = plgpu.SMEM((groups, softmax.ROWS, dim), dtype, transforms=swizzle)
        ring = plgpu.SMEM((STAGES, KEYS, dim), dtype, transforms=swizzle)
        pl.run_scoped(
            scoped,
            held,
            held,
            held,
            ring,
            ring,
            plgpu.Barrier(num_arrivals=3, num_barriers=groups),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
            collective_axes="wg",
        )

    return plgpu.kernel(
        body,
        kernel_name="attention_dq",
        out_type=(
            jax.ShapeDtypeStruct((size, heads, dim), dtype),
            jax.ShapeDtypeStruct((heads, size), jnp.float32),
        ),
        grid=(heads, count),
        grid_names=("head", "tile"),
        num_threads=groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def _exponentials(scores, c: float, less):
    """2^(scores · c − less)"""
    scaled = fused_multiply_add(scores, softmax.full(scores.shape, c, softmax.TILE), -less, softmax.TILE)
    return jnp.exp2(scaled)


def _sum_of_products(left, right):
    """Σ left · right over the columns of two [ROWS, D] buffers in shared memory."""
    width = softmax.columns(left.shape[1])
    total = softmax.full((softmax.ROWS, width), 0, softmax.TILE)
    for column in range(0, left.shape[1], width):
        parts = (plgpu.load(x.at[:, pl.ds(column, width)], layout=softmax.TILE) for x in (left, right))
        total = fused_multiply_add(*(x.astype(jnp.float32) for x in parts), total, softmax.TILE)
    return reduce_columns(total, softmax.TILE, softmax.ROW)


@functools.cache
def _keys(shape, pool, keys, dtype, scale, window, soft_cap, _interpreting):
    (_, heads, dim), (pages, kv_heads, page, _) = shape, pool
    group, per_page = heads // kv_heads, page // keys
    split = (
        keys == KEYS
    )  # as in the forward: both warpgroups have the same keys, and half of the columns each
    held, width = (1, dim // 2) if split else (2, dim)
    c = softmax.factor(scale, soft_cap)

    def body(q_g, do_g, lse_g, delta_g, k_g, v_g, *rest):
        first_g, chunks_g, count_g, place_g, ahead_g, live_g, queries_g, dk_g, dv_g = rest

        def scoped(k_s, v_s, q_s, do_s, lse_s, delta_s, loaded, full, free, together):
            kv_head, number, warpgroup = (lax.axis_index(x) for x in ("head", "tile", "wg"))
            entry, steps = first_g[number], chunks_g[number] * group

            def walk(body, carry):
                """body(step, entry, chunk, query head, carry) -> carry, chunks and heads ascending."""

                def each_step(step, state):
                    entry, chunk, member, carry = state
                    carry = body(step, entry, chunk, kv_head * group + member, carry)
                    member = member + 1
                    chunk = jnp.where(member == group, chunk + 1, chunk)
                    member = jnp.where(member == group, 0, member)
                    over = chunk == count_g[entry]
                    return jnp.where(over, entry + 1, entry), jnp.where(over, 0, chunk), member, carry

                zero = jnp.int32(0)
                return lax.fori_loop(0, steps, each_step, (entry, zero, zero, carry))[3]

            @pl.when(warpgroup < 2)
            def _compute():
                plgpu.set_max_registers(240, action="increase")
                mine = 0 if split else warpgroup
                offset = 0 if split else warpgroup * KEYS
                columns = pl.ds(warpgroup * width if split else 0, width)
                keys_s, values_s = k_s.at[mine], v_s.at[mine]
                rows = pl.ds(lax.rem(number, jnp.int32(per_page)) * keys + offset, KEYS)
                where = lax.div(number, jnp.int32(per_page)), kv_head, rows

                def everyone():
                    if split:
                        plgpu.barrier_arrive(together)
                        plgpu.barrier_wait(together)

                def load():
                    plgpu.copy_gmem_to_smem(k_g.at[where], keys_s, loaded.at[mine])
                    plgpu.copy_gmem_to_smem(v_g.at[where], values_s, loaded.at[mine])

                pl.when(warpgroup == 0)(load) if split else load()
                plgpu.barrier_wait(loaded.at[mine])

                def meet(step, entry, chunk, _, sums):
                    dk, dv = sums
                    slot = lax.rem(step, jnp.int32(STAGES))
                    ahead, live = ahead_g[entry] + chunk * softmax.ROWS - offset, live_g[entry] - offset
                    count = queries_g[entry] - chunk * softmax.ROWS
                    plgpu.barrier_wait(full.at[slot])
                    queries, d_out = q_s.at[slot], do_s.at[slot]
                    softmax.clear_tail(queries, count)
                    softmax.clear_tail(d_out, count)
                    scores, dp = _products(keys_s, queries, values_s, d_out)
                    lse, delta = (
                        lax.broadcast_in_dim(plgpu.load(x.at[slot], layout=PER_QUERY), scores.shape, [1])
                        for x in (lse_s, delta_s)
                    )
                    scores = softmax.cap(scores, scale, soft_cap)
                    p = _exponentials(scores, c, lse)
                    ds = p * (dp - delta) * _slope(scores, soft_cap)
                    whole = (ahead >= KEYS - 1) & (live >= KEYS) & (count >= softmax.ROWS)
                    if window is not None:
                        whole &= ahead + softmax.ROWS <= window

                    def mask(p, ds):
                        seen = _seen(_iota(1) + ahead, _iota(0), live, window) & (_iota(1) < count)
                        return jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)

                    p, ds = lax.cond(whole, lambda *x: x, mask, p, ds)
                    dv = softmax.accumulate(dv, p.astype(dtype), d_out.at[:, columns])
                    dk = softmax.accumulate(dk, ds.astype(dtype), queries.at[:, columns])
                    plgpu.barrier_arrive(free.at[slot])
                    return dk, dv

                zeros = softmax.full((softmax.ROWS, width), 0, softmax.TILE)
                dk, dv = walk(meet, (zeros, zeros))
                everyone()  # has read the keys and values whose place the results take
                keys_s.at[:, columns][...] = (dk * scale).astype(dtype)
                values_s.at[:, columns][...] = dv.astype(dtype)
                plgpu.commit_smem()
                everyone()
                for owner, result, target in ((0, keys_s, dk_g), (1, values_s, dv_g)):

                    @pl.when((warpgroup == owner) | (not split))
                    def _(result=result, target=target):
                        plgpu.copy_smem_to_gmem(result, target.at[where])

                plgpu.wait_smem_to_gmem(0)

            @pl.when(warpgroup == 2)
            def _load():
                plgpu.set_max_registers(24, action="decrease")

                def fetch(step, entry, chunk, head, carry):
                    slot = lax.rem(step, jnp.int32(STAGES))
                    rows = pl.ds((place_g[entry] + chunk) * softmax.ROWS, softmax.ROWS)
                    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(q_g.at[rows, head], q_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(do_g.at[rows, head], do_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(lse_g.at[head, rows], lse_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(delta_g.at[head, rows], delta_s.at[slot], full.at[slot])
                    return carry

                walk(fetch, ())
                drain(free, STAGES, steps)

        swizzle = softmax.swizzled(dim)
        kept = plgpu.SMEM((held, KEYS, dim), dtype, transforms=swizzle)
        ring = plgpu.SMEM((STAGES, softmax.ROWS, dim), dtype, transforms=swizzle)
        numbers = plgpu.SMEM((STAGES, softmax.ROWS), jnp.float32)
        pl.run_scoped(
            scoped,
            kept,
            kept,
            ring,
            ring,
            numbers,
            numbers,
            plgpu.Barrier(num_arrivals=2, num_barriers=held),
            plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            collective_axes="wg",
        )

    out = jax.ShapeDtypeStruct(pool, dtype)
    return plgpu.kernel(
        body,
        kernel_name="attention_dkv",
        out_type=(out, out),
        grid=(kv_heads, pages * per_page),
        grid_names=("head", "tile"),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )
