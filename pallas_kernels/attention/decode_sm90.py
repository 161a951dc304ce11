"""Decode attention on Hopper: one query a sequence, segments spread over the SMs, then merged in order.

A one-warpgroup CTA walks over (segment, KV head) items; the rows of its tile are the query heads of the
group. Keys and values share a ring of tiles. How many CTAs there are and how items fall on them touches no
bit.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import online_softmax_sm90 as softmax
from pallas_kernels.attention.segments_sm90 import BLOCK, SEGMENT
from pallas_kernels.compat import interpreting, pl, plgpu

SMS = 132
SEGMENTS_PER_LOAD = 16
RING = {64: 3, 96: 3, 128: 3, 256: 3}


def decode(q, k_pages, v_pages, tables, lens, *, scale, window, soft_cap):
    """q [S, Hq, D] → [S, Hq, D]; sequences of length 0 give zeros."""
    sequences, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    group = heads // kv_heads
    rows = -(-group // 8) * 8
    if rows != group:
        q = q.reshape(sequences, kv_heads, group, dim)
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0))).reshape(sequences, -1, dim)
    segments = -(-tables.shape[1] * page // SEGMENT)
    per_load = min(SEGMENTS_PER_LOAD, segments)
    segments = -(-segments // per_load) * per_load
    shape = sequences, heads, kv_heads, group, rows, dim, page, segments
    first = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0) // SEGMENT
    items, count = _items(tables, lens, first, segments, page, BLOCK[dim], window)
    k_pages, v_pages = (p.reshape(*p.shape[:2], -1, BLOCK[dim], dim) for p in (k_pages, v_pages))
    partial = _partial(shape, q.dtype, scale, window, soft_cap, interpreting())
    parts = partial(q, k_pages, v_pages, items, count)
    return _merge(shape, q.dtype, per_load, interpreting())(*parts, lens, first)


def _items(tables, lens, first, segments, page, keys, window):
    """What a CTA must know of each segment that exists, in order of sequence, and how many there are.

    One row of int32: sequence, segment, length, first block, the pages of the first two blocks, then of all; so that
    a single read stands between a CTA and its first keys.
    """
    sequences = lens.shape[0]
    ends = jnp.cumsum(-(-lens // SEGMENT) - first).astype(jnp.int32)
    item = jnp.arange(sequences * segments, dtype=jnp.int32)
    owner = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, sequences - 1)
    begin = jnp.where(owner > 0, ends[jnp.maximum(owner - 1, 0)], 0)
    segment = jnp.minimum(item - begin + first[owner], segments - 1)
    length = lens[owner]
    low = jnp.zeros_like(length)
    if window is not None:
        low = jnp.maximum(length - window - segment * SEGMENT, 0) // keys
    blocks = jnp.concatenate(
        [low[:, None] + jnp.arange(2), jnp.tile(jnp.arange(SEGMENT // keys), (item.size, 1))], 1
    )
    index = (segment[:, None] * SEGMENT + blocks * keys) // page
    pages = tables.at[owner[:, None], jnp.minimum(index, tables.shape[1] - 1)].get(mode="promise_in_bounds")
    head = jnp.stack([owner, segment, length, low], axis=1)
    return jnp.concatenate([head, pages], axis=1).astype(jnp.int32), ends[-1:]


@functools.cache
def _partial(shape, dtype, scale, window, soft_cap, _interpreting):
    sequences, _, kv_heads, _, rows, dim, page, segments = shape
    keys, ring = BLOCK[dim], RING[dim]
    per_page = page // keys
    per_segment = SEGMENT // keys
    ctas = min(2 * SMS, sequences * segments * kv_heads)
    c = softmax.factor(scale, soft_cap)

    def body(q_g, k_g, v_g, items_g, count_g, o_g, m_g, l_g, *scratch):
        q_s, (tiles, (o_s, m_s, l_s)), full, q_bar = scratch
        cta = lax.axis_index("cta")

        def look_up(local):
            item = lax.div(cta + local * ctas, jnp.int32(kv_heads))
            item = jnp.minimum(item, sequences * segments - 1)
            return item, *(items_g[item, i] for i in range(6))

        def each_item(local, looked_up):
            item, sequence, segment, length, low, *first_pages = looked_up
            kv_head = lax.rem(cta + local * ctas, jnp.int32(kv_heads))
            start = segment * SEGMENT
            last = pl.cdiv(jnp.minimum(length - start, SEGMENT), jnp.int32(keys))
            whole = lax.div(jnp.minimum(length - start, SEGMENT), jnp.int32(keys))

            def load(is_value, j, slot, index):
                block = lax.rem(segment * per_segment + j, jnp.int32(per_page))
                source = (v_g if is_value else k_g).at[index, kv_head, block]
                plgpu.copy_gmem_to_smem(source, tiles.at[slot], full.at[slot])

            plgpu.wait_smem_to_gmem(0)  # the tiles' memory held the last item's results
            for tile in range(ring):

                @pl.when(low + tile // 2 < last)
                def _(tile=tile):
                    load(tile % 2, low + tile // 2, tile, first_pages[tile // 2])

            plgpu.copy_gmem_to_smem(
                q_g.at[sequence, pl.ds(kv_head * rows, rows)], q_s.at[pl.ds(0, rows)], q_bar
            )
            following = look_up(local + 1)
            plgpu.barrier_wait(q_bar)

            def refill(tile, j, slot):
                ahead = j + (ring + tile) // 2

                @pl.when(ahead < last)
                def _():
                    load((ring + tile) % 2, ahead, slot, items_g[item, 6 + ahead])

            def each_block(j, state, edge):
                acc, m, mass = state
                k_slot = lax.rem(2 * (j - low), jnp.int32(ring))
                v_slot = lax.rem(2 * (j - low) + 1, jnp.int32(ring))
                plgpu.barrier_wait(full.at[k_slot])

                def product(ref):
                    plgpu.wgmma(ref, q_s, tiles.at[k_slot].transpose((1, 0)))
                    return ref[...]

                scores = pl.run_scoped(product, plgpu.ACC((softmax.ROWS, keys), jnp.float32))
                refill(0, j, k_slot)
                scores = softmax.cap(scores, scale, soft_cap)
                if edge:
                    key = plgpu.broadcasted_iota(jnp.int32, (softmax.ROWS, keys), 1, layout=softmax.TILE)
                    scores = softmax.mask(scores, length - 1, key + (start + j * keys), window)
                p, acc, m, mass = softmax.block(scores, acc, m, mass, c, dtype)
                plgpu.barrier_wait(full.at[v_slot])
                if edge:
                    softmax.clear_tail(tiles.at[v_slot], length - start - j * keys)
                acc = softmax.accumulate(acc, p, tiles.at[v_slot])
                refill(1, j, v_slot)
                return acc, m, mass

            state = softmax.empty(dim)
            if window is None:
                state = lax.fori_loop(low, whole, functools.partial(each_block, edge=False), state)
                state = lax.fori_loop(whole, last, functools.partial(each_block, edge=True), state)
            else:
                state = lax.fori_loop(low, last, functools.partial(each_block, edge=True), state)
            o_s[...], m_s[...], l_s[...] = state
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, rows)], o_g.at[sequence, kv_head, segment])
            plgpu.copy_smem_to_gmem(m_s, m_g.at[sequence, kv_head, segment])
            plgpu.copy_smem_to_gmem(l_s, l_g.at[sequence, kv_head, segment])
            return following

        begin = look_up(jnp.int32(0))  # does not wait for the count
        mine = jnp.maximum(count_g[0] * kv_heads - cta, 0)
        lax.fori_loop(0, pl.cdiv(mine, jnp.int32(ctas)), each_item, begin)
        plgpu.wait_smem_to_gmem(0)

    parts = sequences, kv_heads, segments
    tile = softmax.swizzled(dim)
    tiles = plgpu.SMEM((ring, keys, dim), dtype, transforms=tile)
    results = (
        plgpu.SMEM((softmax.ROWS, dim), jnp.float32, transforms=softmax.swizzled(dim, 4)),
        plgpu.SMEM((softmax.ROWS,), jnp.float32),
        plgpu.SMEM((softmax.ROWS,), jnp.float32),
    )
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*parts, rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((*parts, softmax.ROWS), jnp.float32),
            jax.ShapeDtypeStruct((*parts, softmax.ROWS), jnp.float32),
        ),
        scratch_types=[
            plgpu.SMEM((softmax.ROWS, dim), dtype, transforms=tile),
            plgpu.RefUnion(tiles, results),
            plgpu.Barrier(num_barriers=ring),
            plgpu.Barrier(),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


@functools.cache
def _merge(shape, dtype, per_load, _interpreting):
    """One CTA a (query head, sequence); partial results come in chunks of segments through shared memory."""
    sequences, heads, _, group, _, dim = shape[:6]
    width = -(-dim // 128) * 128  # lanes past a row's end compute what nobody reads
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1)

    def vector(value):
        return plgpu.layout_cast(lax.broadcast_in_dim(value, (width,), []), layout)

    def body(o_g, m_g, l_g, lens_g, first_g, out_g, o_s, m_s, l_s, out_s, bar, o_bar):
        head, sequence = lax.axis_index("head"), lax.axis_index("sequence")
        kv_head, row = lax.div(head, jnp.int32(group)), lax.rem(head, jnp.int32(group))
        first, count = first_g[sequence], pl.cdiv(lens_g[sequence], jnp.int32(SEGMENT))

        def each_chunk(chunk, state):
            where = sequence, kv_head, pl.ds(chunk * per_load, per_load)
            plgpu.copy_gmem_to_smem(m_g.at[where], m_s, bar.at[0])
            plgpu.copy_gmem_to_smem(l_g.at[where], l_s, bar.at[1])
            for i in range(per_load):
                plgpu.copy_gmem_to_smem(
                    o_g.at[sequence, kv_head, chunk * per_load + i, row], o_s.at[pl.ds(i * dim, dim)], o_bar
                )
            plgpu.barrier_wait(bar.at[0])
            plgpu.barrier_wait(bar.at[1])
            plgpu.barrier_wait(o_bar)
            for i in range(per_load):
                at = chunk * per_load + i
                present = (at >= first) & (at < count)
                acc = plgpu.load(o_s.at[pl.ds(i * dim, width)], layout=layout)
                part = softmax.merge(*state, acc, vector(m_s[i, row]), vector(l_s[i, row]), layout, layout)
                state = tuple(
                    jnp.where(lax.broadcast_in_dim(present, (width,), []), new, old)
                    for new, old in zip(part, state, strict=True)
                )
            return state

        state = tuple(vector(jnp.float32(value)) for value in (0, softmax.EMPTY, 0))
        low, high = lax.div(first, jnp.int32(per_load)), pl.cdiv(count, jnp.int32(per_load))
        out, _, total = lax.fori_loop(low, high, each_chunk, state)
        out_s[...] = softmax.finish(out, total, dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, dim)], out_g.at[sequence, head])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((sequences, heads, dim), dtype),
        scratch_types=[
            plgpu.SMEM((per_load * dim + width - dim,), jnp.float32),
            plgpu.SMEM((per_load, softmax.ROWS), jnp.float32),
            plgpu.SMEM((per_load, softmax.ROWS), jnp.float32),
            plgpu.SMEM((width,), dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=per_load),
        ],
        grid=(heads, sequences),
        grid_names=("head", "sequence"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
