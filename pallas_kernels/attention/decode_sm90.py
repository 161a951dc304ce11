"""Decode attention on Hopper: one query a sequence, its keys walked by one CTA or, segment by segment, by several.

A one-warpgroup CTA takes (item, KV head) pairs from a list. Its products are turned, keys · qᵀ and vᵀ · pᵀ, so that a
group's few query heads are the short side of a tile, not padding of its 64 rows; between the products scores go
through shared memory to a layout in which every lane holds some keys of one query. The operands' sides change no bit.
An item is a whole sequence, whose segments the CTA merges as it goes, or, where a sequence is long for the load at
hand, one segment: its (acc, m, l) goes to memory, and whichever CTA is the last to hand one in merges all of the
sequence's, in ascending order. Both give the same bits: who merges is up to the load, in which order never is. Keys
and values share a ring of tiles that runs on from one item to the next, so that loads never wait for an item's end.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import online_softmax_sm90 as softmax
from pallas_kernels.attention.segments_sm90 import BLOCK, SEGMENT
from pallas_kernels.compat import (
    count_up,
    fused_multiply_add,
    interpreting,
    pl,
    plgpu,
    reaching_past,
    store_part,
    store_turned,
)

SCORES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 16), (2, 8), (2, 2), (1,))), warp_dims=(-7,), lane_dims=(-3, -4, -2, -6), vector_dim=-1
)
"""[queries, keys]: a lane holds every sixteenth key of a query, and its neighbours are those with which
`compat.reduce_columns` adds first."""
QUERY = SCORES.reduce(1)
SMS = 132
CTAS = 2 * SMS
CHUNK = 32
"""Of a sequence's last block only chunks of so many keys that hold one are loaded."""
RING = 3
"""Tiles of keys or values in flight: those of a block and a half."""
SHARE = 4
"""A sequence of at most 1 / SHARE of what a CTA has to do is one item."""
AT_ONCE = 8
"""Segments whose results are read before the first of them is merged."""
MERGED_ROWS = 4
FIELDS = 7
"""Of an item: sequence, first block, end block, length, segment (−1 for all), its sequence's first and end segment."""


def decode(q, k_pages, v_pages, tables, lens, *, scale, window, soft_cap):
    """q [S, Hq, D] → [S, Hq, D]; rows of sequences of length 0 are not written."""
    sequences, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    segments = -(-tables.shape[1] * page // SEGMENT)
    shape = sequences, kv_heads, heads // kv_heads, dim, page, segments
    items, count, (whole, *ranges) = _items(lens, shape, window)
    q = q.reshape(sequences, kv_heads, -1, dim)
    k_pages, v_pages = (p.reshape(*p.shape[:2], -1, BLOCK[dim], dim) for p in (k_pages, v_pages))
    # Counts arrivals at (sequence, KV head); the kernel leaves it as it was.
    arrived = [jnp.zeros((sequences, kv_heads), jnp.int32)] if segments > 1 else []
    call = _kernel(shape, q.dtype, scale, window, soft_cap, interpreting())
    out, *parts = call(q, k_pages, v_pages, tables, lens, items, count, *arrived)
    if interpreting() and parts:  # without atomic operations, a launch of its own merges
        merged = _merge_kernel(shape, q.dtype)(*parts, *ranges)
        out = jnp.where(whole[:, None, None, None], out, merged)
    return out.reshape(sequences, heads, dim)


def part_bytes(heads: int, kv_heads: int, dim: int, keys: int) -> int:
    """What `decode` needs for the segments of one sequence of up to so many keys."""
    segments = -(-keys // SEGMENT)
    rows, width = _part_shape(heads // kv_heads, dim)
    return kv_heads * segments * rows * (width + 2) * 4 if segments > 1 else 0


def _part_shape(group: int, dim: int) -> tuple[int, int]:
    """Rows and columns in memory of one segment's result for a KV head's queries."""
    return -(-group // MERGED_ROWS) * MERGED_ROWS, -(-dim // 128) * 128


def _items(lens, shape, window):
    """Items [S · segments, FIELDS] by sequence, their number, and each sequence's (whole, first, end segment)."""
    sequences, kv_heads, _, dim, _, segments = shape
    keys = BLOCK[dim]
    first = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0) // SEGMENT
    end = -(-lens // SEGMENT)
    most = jnp.sum(end - first) * kv_heads // (SHARE * CTAS)
    whole = end - first <= jnp.maximum(most, 1)
    ends = jnp.cumsum(jnp.where(whole, jnp.minimum(end - first, 1), end - first)).astype(jnp.int32)
    item = jnp.arange(sequences * segments, dtype=jnp.int32)
    owner = jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(owner, sequences - 1)
    begin = jnp.where(owner > 0, ends[jnp.maximum(owner - 1, 0)], 0)
    length, alone, low, high = lens[owner], whole[owner], first[owner], end[owner]
    segment = jnp.minimum(item - begin + low, segments - 1)
    start = jnp.where(alone, low, segment) * (SEGMENT // keys)
    if window is not None:
        start = jnp.maximum(start, (length - window) // keys)
    stop = jnp.minimum(jnp.where(alone, high, segment + 1) * (SEGMENT // keys), -(-length // keys))
    fields = owner, start, stop, length, jnp.where(alone, -1, segment), low, high
    return jnp.stack(fields, axis=1).astype(jnp.int32), ends[-1:], (whole, first, end)


@functools.cache
def _kernel(shape, dtype, scale, window, soft_cap, interpreted):
    sequences, kv_heads, group, dim, page, segments = shape
    split, rows = segments > 1, softmax.ROWS if interpreted else -(-group // 8) * 8
    loaded = group if interpreted else rows  # past the group the copy fills in zeros
    keys = BLOCK[dim]
    # vᵀ is taken in heights of 64; where head_dim isn't, the last two overlap.
    heights = [(0, dim)] if dim % 64 == 0 else [(first, 64) for first in (*range(0, dim - 64, 64), dim - 64)]
    per_page, per_segment = page // keys, SEGMENT // keys
    ctas = min(CTAS, sequences * segments * kv_heads)
    c = softmax.factor(scale, soft_cap)

    def body(q_g, k_g, v_g, tables_g, lens_g, items_g, count_g, *rest):
        rest = list(rest)
        arrived_g = rest.pop(0) if split else None
        out_g, *parts = (rest.pop(0) for _ in range(4 if split else 1))
        q_s, tiles, scores_s, p_s, shared_s, full, q_bar, *seen_s = rest
        cta = lax.axis_index("cta")
        mine = lax.div(count_g[0] * kv_heads - cta + ctas - 1, jnp.int32(ctas))

        def of_item(local, *fields):
            item = lax.div(cta + local * ctas, jnp.int32(kv_heads))
            return tuple(items_g[jnp.minimum(item, sequences * segments - 1), field] for field in fields)

        def kv_head_of(local):
            return lax.rem(cta + local * ctas, jnp.int32(kv_heads))

        def cursor(local, sequence, j, end):
            """A block of this CTA: (local item, sequence, block, the item's end, page, keys that exist)."""
            at = jnp.minimum(lax.div(j, jnp.int32(per_page)), tables_g.shape[1] - 1)
            return local, sequence, j, end, tables_g[sequence, at], lens_g[sequence] - j * keys

        def advance(at, following):
            """The block after `at`, and the first block and end of the item after that one."""
            local, sequence, j, end, *_ = at
            more = j + 1 < end
            new = [local, sequence, j + 1, end]
            new = [jnp.where(more, a, b) for a, b in zip(new, (local + 1, *following), strict=True)]
            return cursor(*new), of_item(new[0] + 1, 0, 1, 2)

        def load(source, at, slot):
            local, _, j, _, page_index, live = at
            where = page_index, kv_head_of(local), lax.rem(j, jnp.int32(per_page))
            for size in range(CHUNK, keys + 1, CHUNK):
                least = live > size - CHUNK

                @pl.when((local < mine) & (least if size == keys else least & (live <= size)))
                def _(size=size):
                    part = pl.ds(0, size)
                    plgpu.copy_gmem_to_smem(source.at[*where, part], tiles.at[slot, part], full.at[slot])

        def load_queries(local, sequence):
            part = reaching_past(q_g, sequence, kv_head_of(local), pl.ds(0, loaded))
            plgpu.copy_gmem_to_smem(part, q_s.at[pl.ds(0, loaded)], q_bar)

        def empty():
            zeros = tuple(softmax.full((height, rows), 0, softmax.TILE) for _, height in heights)
            return zeros, softmax.full((rows,), softmax.EMPTY, QUERY), softmax.full((rows,), 0, QUERY)

        def spread(*values):
            """Numbers of each query, for tiles of vᵀ · pᵀ."""
            for i, value in enumerate(values):
                shared_s.at[i][...] = value
            plgpu.commit_smem()
            layout = softmax.TILE.reduce(0)
            return [plgpu.load(shared_s.at[i], layout=layout, optimized=False) for i in range(len(values))]

        def scaled(tile, factor):
            return tile * lax.broadcast_in_dim(factor, tile.shape, [1])

        def merge(merged, current):
            (out, best, total), (acc, m, mass) = merged, current
            *factors, best, total = softmax.shares(best, total, m, mass, QUERY)
            a, b = spread(*factors)
            both = zip(out, acc, strict=True)
            wide = lambda x, tile: lax.broadcast_in_dim(x, tile.shape, [1])  # noqa: E731
            out = (fused_multiply_add(o, wide(a, o), scaled(x, b), softmax.TILE) for o, x in both)
            return tuple(out), best, total

        def each_item(local, state):
            item, carried = state
            sequence, first, end, length, segment, first_segment, end_segment = item
            following_item = of_item(local + 1, *range(FIELDS))  # long before it is asked for
            kv_head = kv_head_of(local)
            plgpu.barrier_wait(q_bar)

            def each_block(j, state):
                (tile, ahead, following), merged, current = state
                k_slot, v_slot = lax.rem(tile, jnp.int32(RING)), lax.rem(tile + 1, jnp.int32(RING))
                further, following = advance(ahead, following)
                plgpu.barrier_wait(full.at[k_slot])

                turned = softmax.turned_product(tiles.at[k_slot], q_s)
                load(v_g, ahead, k_slot)
                pl.when((j + 1 == end) & (local + 1 < mine))(lambda: load_queries(*ahead[:2]))
                store_turned(turned, softmax.TILE, scores_s)
                scores = softmax.cap(plgpu.load(scores_s, layout=SCORES, optimized=False), scale, soft_cap)

                def mask(scores):
                    key = plgpu.broadcasted_iota(jnp.int32, (rows, keys), 1, layout=SCORES)
                    return softmax.mask(scores, length - 1, key + j * keys, window)

                if window is None:
                    scores = lax.cond(length < (j + 1) * keys, mask, lambda scores: scores, scores)
                else:
                    scores = mask(scores)
                if split:
                    merged, current = lax.cond(
                        (lax.rem(j, jnp.int32(per_segment)) == 0) & (j > first),
                        lambda merged, current: (merge(merged, current), empty()),
                        lambda *same: same,
                        *(merged, current),
                    )
                acc, m, mass = current
                p, alpha, m, mass = softmax.block(scores, m, mass, c, dtype, SCORES, QUERY)
                p_s[...] = p
                (alpha,) = spread(alpha)
                plgpu.barrier_wait(full.at[v_slot])
                softmax.clear_tail(tiles.at[v_slot], length - j * keys)
                acc = [
                    softmax.accumulate_turned(
                        scaled(x, alpha), tiles.at[v_slot, :, pl.ds(start, height)], p_s
                    )
                    for x, (start, height) in zip(acc, heights, strict=True)
                ]
                load(k_g, further, v_slot)
                return (tile + 2, further, following), merged, (tuple(acc), m, mass)

            state = carried, empty() if split else (), empty()
            carried, merged, current = lax.fori_loop(first, end, each_block, state)

            def finish():
                out, _, total = merge(merged or empty(), current)
                (inverse,) = spread(softmax.reciprocal(total))
                for tile, (start, height) in zip(out, heights, strict=True):
                    value = (scaled(tile, inverse) + 0.0).astype(dtype)
                    at = sequence, kv_head, slice(None), pl.ds(start, height)
                    store_turned(value, softmax.TILE, out_g.at[at])

            def hand_in():
                where = sequence, kv_head, segment
                acc, *numbers = current
                for tile, (start, height) in zip(acc, heights, strict=True):
                    at = (*where, pl.ds(0, group), pl.ds(start, height))
                    store_turned(tile, softmax.TILE, parts[0].at[at])
                for value, part in zip(numbers, parts[1:], strict=True):
                    store_part(value, QUERY, part.at[(*where, pl.ds(0, group))], (0, group))
                if interpreted:
                    return
                count_up(arrived_g.at[sequence, pl.ds(kv_head, 1)], seen_s[0])

                @pl.when(seen_s[0][0] == end_segment - first_segment - 1)
                def _():
                    arrived_g[sequence, kv_head] = jnp.int32(0)
                    ranges = first_segment, end_segment
                    _merge(shape, dtype, parts, out_g, sequence, kv_head, *ranges)

            if split:
                pl.when(segment < 0)(finish)
                pl.when(segment >= 0)(hand_in)
            else:
                finish()
            return following_item, carried

        @pl.when(mine > 0)
        def _():
            item = of_item(0, *range(FIELDS))
            at = cursor(jnp.int32(0), *item[:3])
            load(k_g, at, 0)
            load_queries(*at[:2])
            load(v_g, at, 1)
            at, following = advance(at, of_item(1, 0, 1, 2))
            load(k_g, at, 2)
            lax.fori_loop(0, mine, each_item, (item, (jnp.int32(0), at, following)))

    tile = softmax.swizzled(dim)
    outputs = [jax.ShapeDtypeStruct((sequences, kv_heads, group, dim), dtype)]
    if split:
        merged_rows, width = _part_shape(group, dim)
        parts = sequences, kv_heads, segments, merged_rows
        outputs.append(jax.ShapeDtypeStruct((*parts, width), jnp.float32))
        outputs += [jax.ShapeDtypeStruct(parts, jnp.float32)] * 2
    return plgpu.kernel(
        body,
        kernel_name="attention_decode",
        out_type=outputs,
        scratch_types=[
            plgpu.SMEM((rows, dim), dtype, transforms=tile),
            plgpu.SMEM((RING, keys, dim), dtype, transforms=tile),
            plgpu.SMEM((rows, keys), jnp.float32),
            plgpu.SMEM((rows, keys), dtype, transforms=tile),  # both operands want one swizzle
            plgpu.SMEM((2, rows), jnp.float32),
            plgpu.Barrier(num_barriers=RING),
            plgpu.Barrier(),
            *([plgpu.SMEM((1,), jnp.int32)] if split else []),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )


def _merge(shape, dtype, parts, out_g, sequence, kv_head, first, end):
    """Merges the segments of a sequence for the query heads of a KV head, a few rows at a time, a row a warp."""
    group, dim, segments = shape[2], shape[3], shape[5]
    width = parts[0].shape[-1]
    tiles = ((MERGED_ROWS, width), (4,)) if width == 128 else ((MERGED_ROWS, width), (128,), (4,))
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(-1 - len(tiles),), lane_dims=(-2,), vector_dim=-1
    )
    layouts = layout, layout.reduce(1), layout.reduce(1)

    def some_rows(row, count):
        def each_chunk(chunk, state):
            begin = first + chunk * AT_ONCE
            loaded = []
            for i in range(AT_ONCE):
                at = sequence, kv_head, jnp.minimum(begin + i, segments - 1), pl.ds(row, MERGED_ROWS)
                pairs = zip(parts, layouts, strict=True)
                loaded.append([plgpu.load(p.at[at], layout=a, optimized=False) for p, a in pairs])
            for i, part in enumerate(loaded):
                new, present = softmax.merge(*state, *part, *layouts[:2]), begin + i < end
                pairs = zip(new, state, strict=True)
                state = tuple(jnp.where(lax.broadcast_in_dim(present, a.shape, []), a, b) for a, b in pairs)
            return state

        shapes = (MERGED_ROWS, width), (MERGED_ROWS,), (MERGED_ROWS,)
        state = tuple(map(softmax.full, shapes, (0, softmax.EMPTY, 0), layouts))
        out, _, total = lax.fori_loop(0, pl.cdiv(end - first, jnp.int32(AT_ONCE)), each_chunk, state)
        at = sequence, kv_head, pl.ds(row, count)
        store_part(softmax.finish(out, total, dtype), layout, out_g.at[at], (0, count), (0, dim))

    whole = group // MERGED_ROWS

    @pl.loop(0, whole)
    def _(i):
        some_rows(i * MERGED_ROWS, MERGED_ROWS)

    if rest := group % MERGED_ROWS:
        some_rows(whole * MERGED_ROWS, rest)


@functools.cache
def _merge_kernel(shape, dtype):
    sequences, kv_heads, group, dim = shape[:4]

    def body(o_g, m_g, l_g, first_g, end_g, out_g):
        sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
        ranges = first_g[sequence], end_g[sequence]
        _merge(shape, dtype, (o_g, m_g, l_g), out_g, sequence, kv_head, *ranges)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((sequences, kv_heads, group, dim), dtype),
        grid=(kv_heads, sequences),
        grid_names=("kv_head", "sequence"),
    )
