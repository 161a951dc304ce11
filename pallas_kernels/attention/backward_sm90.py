"""Attention's gradient on Hopper, as in FlashAttention-2 (Dao 2023), in two kernels and without atomics.

Scores are in log2 units as in the forward (`online_softmax_sm90`): s = q·k through the soft-cap, c = `softmax.factor`.

`_queries`, 64 queries of one head a warpgroup, blocks of KEYS keys ascending, twice. First, from m = −1e30, l = δ = 0:

    m′ = max(m, max(s) · c);  p = 2^fma(s, c, −m′);  α = 2^(m − m′)
    l = fma(l, α, Σp);  δ = fma(δ, α, Σ p · dp)  with dp = do·v

with Σ the pinned tree of `reduce_columns`; at the end L = m + log2 l and δ = δ / l. Then

    p = 2^fma(s, c, −L);  ds = p · (dp − δ), times 1 − tanh² under a soft-cap;  dq += round(ds) · k, keys ascending

`_keys`, 64 keys a warpgroup, chunks of 64 queries ascending, in a chunk the query heads of the KV head ascending, with
p and ds computed again: dv += round(p)ᵀ · do and dk += round(ds)ᵀ · q. Pages that sequences share sum those in
ascending order. All sums are float32 accumulators of wgmma; dq and dk are multiplied by `scale` and rounded at the end.

What a query doesn't see adds exact zeros, so where a loop begins and ends touches no bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import online_softmax_sm90 as softmax
from pallas_kernels.attention.backward_tiles_sm90 import (
    QUERIES,
    key_tiles,
    query_tiles,
    to_rows,
    to_tiles,
)
from pallas_kernels.compat import drain, fused_multiply_add, interpreting, pl, plgpu, reduce_columns

KEYS = 64
STAGES = 2
WIDEST = 128
"""Above this head_dim a CTA has half the queries, or half the keys, whose columns two warpgroups share."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def attention(q, k_pages, v_pages, block_tables, query_start, seq_lens, d_out, *, scale, window, soft_cap):
    """(dq, dk, dv) in the dtypes and shapes of q, k_pages and v_pages; what no sequence has is zero.

    A sequence's keys and values must be finite, as in the forward.
    """
    tokens, _, dim = q.shape
    pages, kv_heads, page, _ = k_pages.shape
    groups, keys = (1, KEYS) if dim > WIDEST else (2, 2 * KEYS)
    tiles = query_tiles(query_start, seq_lens, tokens, groups * softmax.ROWS)
    owners = key_tiles(block_tables, query_start, seq_lens, tiles, (pages, page), keys, window)
    q, d_out = to_tiles(q, tiles), to_tiles(d_out, tiles)
    options = scale, window, soft_cap, interpreting()
    blocks = (p.reshape(pages, kv_heads, -1, KEYS, dim) for p in (k_pages, v_pages))
    call = _queries(q.shape, (kv_heads, page), len(tiles.keys), groups, q.dtype, *options)
    dq, lse, delta = call(q, d_out, *blocks, block_tables, tiles.sequence, tiles.position, tiles.keys)
    call = _keys(q.shape, k_pages.shape, keys, q.dtype, *options)
    numbers = owners.first, owners.chunks, owners.count, owners.place, owners.ahead, owners.live
    dk, dv = call(q, d_out, lse, delta, k_pages, v_pages, *numbers)
    return to_rows(dq, tiles), dk, dv


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


def _cleared(seen, *values):
    return tuple(jnp.where(seen, x, 0.0) for x in values)


@functools.cache
def _queries(shape, pool, count, groups, dtype, scale, window, soft_cap, _interpreting):
    (size, heads, dim), (kv_heads, page) = shape, pool
    group, per_page, tile = heads // kv_heads, page // KEYS, groups * softmax.ROWS
    c = softmax.factor(scale, soft_cap)

    def body(q_g, do_g, k_g, v_g, tables_g, owner_g, position_g, live_g, dq_g, lse_g, delta_g):
        def scoped(q_s, do_s, k_s, v_s, loaded, full, free):
            head, warpgroup = lax.axis_index("head"), lax.axis_index("wg")
            at = count - 1 - lax.axis_index("tile")  # long rows first
            sequence, position, length = owner_g[at], position_g[at], live_g[at]
            last = pl.cdiv(jnp.minimum(position + tile, length), jnp.int32(KEYS))
            first = jnp.int32(0)
            if window is not None:
                first = lax.div(jnp.maximum(position - (window - 1), 0), jnp.int32(KEYS))
            blocks = last - first

            @pl.when((warpgroup < groups) & (length > 0))
            def _compute():
                if groups > 1:
                    plgpu.set_max_registers(240, action="increase")
                rows = pl.ds(at * tile + warpgroup * softmax.ROWS, softmax.ROWS)
                queries, d_out = q_s.at[warpgroup], do_s.at[warpgroup]
                plgpu.copy_gmem_to_smem(q_g.at[rows, head], queries, loaded.at[warpgroup])
                plgpu.copy_gmem_to_smem(do_g.at[rows, head], d_out, loaded.at[warpgroup])
                plgpu.barrier_wait(loaded.at[warpgroup])
                base = position + warpgroup * softmax.ROWS

                def block(i, step):
                    """(slot, scores, dp, first key, whether all rows see all keys)"""
                    slot, start = lax.rem(step, jnp.int32(STAGES)), (first + i) * KEYS
                    plgpu.barrier_wait(full.at[slot])
                    scores, dp = _products(queries, k_s.at[slot], d_out, v_s.at[slot])
                    whole = start + KEYS <= jnp.minimum(base + 1, length)
                    if window is not None:
                        whole &= start + window >= base + softmax.ROWS
                    return slot, softmax.cap(scores, scale, soft_cap), dp, start, whole

                def seen(start):
                    return _seen(_iota(0) + (base - start), _iota(1), length - start, window)

                def normalise(i, state):
                    m, mass, delta = state
                    slot, scores, dp, start, whole = block(i, i)
                    plgpu.barrier_arrive(free.at[slot])

                    def mask(scores, dp):
                        visible = seen(start)
                        return jnp.where(visible, scores, -jnp.inf), jnp.where(visible, dp, 0.0)

                    scores, dp = lax.cond(whole, lambda *x: x, mask, scores, dp)
                    new = jnp.maximum(m, scores.max(axis=1) * c)
                    alpha = jnp.exp2(m - new)
                    p = _exponentials(scores, c, softmax.spread(new, KEYS))
                    mass = fused_multiply_add(mass, alpha, _sum(p), softmax.ROW)
                    return new, mass, fused_multiply_add(delta, alpha, _sum(p * dp), softmax.ROW)

                state = (softmax.full((softmax.ROWS,), x, softmax.ROW) for x in (softmax.EMPTY, 0, 0))
                m, mass, delta = lax.fori_loop(0, blocks, normalise, tuple(state))
                some = mass > 0.0  # a row that only fills up the tile may see no key
                mass = jnp.where(some, mass, 1.0)
                lse = jnp.where(some, m + jnp.log(mass) * softmax.LOG2_E, 0.0)
                delta = delta / mass
                lse_g.at[head, rows][...] = lse
                delta_g.at[head, rows][...] = delta
                lse, delta = (softmax.spread(x, KEYS) for x in (lse, delta))

                def through(i, dq):
                    slot, scores, dp, start, whole = block(i, blocks + i)
                    ds = _exponentials(scores, c, lse) * (dp - delta) * _slope(scores, soft_cap)
                    (ds,) = lax.cond(whole, lambda x: (x,), lambda x: _cleared(seen(start), x), ds)
                    keys = k_s.at[slot]
                    softmax.clear_tail(keys, length - start)
                    dq = softmax.accumulate(dq, ds.astype(dtype), keys)
                    plgpu.barrier_arrive(free.at[slot])
                    return dq

                dq = lax.fori_loop(0, blocks, through, softmax.full((softmax.ROWS, dim), 0, softmax.TILE))
                queries[...] = (dq * scale).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(queries, dq_g.at[rows, head])
                plgpu.wait_smem_to_gmem(0)

            @pl.when((warpgroup == groups) & (length > 0))
            def _load():
                if groups > 1:
                    plgpu.set_max_registers(24, action="decrease")
                kv_head = lax.div(head, jnp.int32(group))

                def each_block(step, _):
                    slot, j = lax.rem(step, jnp.int32(STAGES)), first + lax.rem(step, blocks)
                    where = tables_g[sequence, lax.div(j, jnp.int32(per_page))], kv_head
                    where = *where, lax.rem(j, jnp.int32(per_page))
                    pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_g.at[where], k_s.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(v_g.at[where], v_s.at[slot], full.at[slot])
                    return ()

                lax.fori_loop(0, 2 * blocks, each_block, ())
                drain(free, STAGES, 2 * blocks)

        swizzle = softmax.swizzled(dim)
        held = plgpu.SMEM((groups, softmax.ROWS, dim), dtype, transforms=swizzle)
        ring = plgpu.SMEM((STAGES, KEYS, dim), dtype, transforms=swizzle)
        pl.run_scoped(
            scoped,
            held,
            held,
            ring,
            ring,
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=groups, num_barriers=STAGES),
            collective_axes="wg",
        )

    number = jax.ShapeDtypeStruct((heads, size), jnp.float32)
    return plgpu.kernel(
        body,
        kernel_name="attention_dq",
        out_type=(jax.ShapeDtypeStruct(shape, dtype), number, number),
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


def _sum(x):
    return reduce_columns(x, softmax.TILE, softmax.ROW)


@functools.cache
def _keys(shape, pool, keys, dtype, scale, window, soft_cap, _interpreting):
    (_, heads, dim), (pages, kv_heads, page, _) = shape, pool
    group, per_page = heads // kv_heads, page // keys
    split = keys == KEYS  # both warpgroups have the same keys, and half of the columns each
    held, width = (1, dim // 2) if split else (2, dim)
    c = softmax.factor(scale, soft_cap)

    def body(q_g, do_g, lse_g, delta_g, k_g, v_g, *rest):
        first_g, chunks_g, count_g, place_g, ahead_g, live_g, dk_g, dv_g = rest

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
                    ahead, live = ahead_g[entry] + chunk * QUERIES - offset, live_g[entry] - offset
                    plgpu.barrier_wait(full.at[slot])
                    queries, d_out = q_s.at[slot], do_s.at[slot]
                    scores, dp = _products(keys_s, queries, values_s, d_out)
                    lse, delta = (
                        lax.broadcast_in_dim(plgpu.load(x.at[slot], layout=COLUMNS), scores.shape, [1])
                        for x in (lse_s, delta_s)
                    )
                    scores = softmax.cap(scores, scale, soft_cap)
                    p = _exponentials(scores, c, lse)
                    ds = p * (dp - delta) * _slope(scores, soft_cap)
                    whole = (ahead >= KEYS - 1) & (live >= KEYS)
                    if window is not None:
                        whole &= ahead + QUERIES <= window

                    def mask(p, ds):
                        return _cleared(_seen(_iota(1) + ahead, _iota(0), live, window), p, ds)

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
                    rows = pl.ds((place_g[entry] + chunk) * QUERIES, QUERIES)
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
        ring = plgpu.SMEM((STAGES, QUERIES, dim), dtype, transforms=swizzle)
        numbers = plgpu.SMEM((STAGES, QUERIES), jnp.float32)
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
