"""Paged attention for the xla backend.

Queries are cut into tiles of one sequence each. A tile walks over its sequence's pages (one page is one segment),
computes the segment's softmax from an empty state and merges it. Where XLA's dots are free in the row count all
tiles go through together and a tile is as long as it likes; elsewhere tiles have a fixed shape and are mapped over
in groups of a fixed size, for decode and prefill alike. Prompts that fill them go in larger tiles where those were
proven to keep the bits (`proven.py`).

A key that a row doesn't see must not reach it, and 0 · NaN would. So P · V never meets an infinite or NaN value that
some row of the tile doesn't see: decode, whose rows sit at one position, clears what that position doesn't see;
prefill clears all such values and gives their keys NaN scores, which the mask takes away where they aren't seen.
Either way a row that sees one isn't finite, and the end makes it NaN throughout.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.tiles import tiles
from pallas_kernels.backend import attention_tiles, rows_are_free
from pallas_kernels.numerics import COLUMN_BLOCK, ROW_TILE, TRASH_PAGE
from pallas_kernels.proven import ATTENTION_GROUP, ATTENTION_TILE, Attention, attention_is_larger
from pallas_kernels.reduce import dot_f32, pin, row_sum

PREFILL_TILE = 32
ROW_FREE_MAX_DIM = 256  # above 256 columns XLA splits a dot's k when rows are few


def attention(q, *operands, **options):
    """See `op.attention`."""
    return unrounded(q, *operands, **options).astype(q.dtype)


def unrounded(
    q, k_pages, v_pages, block_tables, query_start, seq_lens, *, scale, window, soft_cap, max_query_len
):
    """The same before its last rounding, in float32."""
    tokens, heads, dim = q.shape
    kv_heads = k_pages.shape[1]
    free = rows_are_free() and dim <= ROW_FREE_MAX_DIM
    sequences = seq_lens.shape[0]
    tile, group_size = ROW_TILE, attention_tiles()
    if free:
        tile = min(max_query_len, PREFILL_TILE)
    elif max_query_len > 1 and tokens >= ATTENTION_TILE * sequences:  # or most of a tile may be padding
        shape = Attention(heads, kv_heads, dim, str(q.dtype), window, soft_cap)
        if attention_is_larger(shape):
            tile, group_size = ATTENTION_TILE, ATTENTION_GROUP
    if max_query_len == 1:
        seq, start = jnp.arange(sequences, dtype=jnp.int32), jnp.zeros(sequences, jnp.int32)
    else:
        seq, start = tiles(query_start, tile, tokens // tile + sequences)
    offset = jnp.arange(tile, dtype=jnp.int32)
    rows = query_start[seq][:, None] + start[:, None] + offset
    real = rows < query_start[seq + 1][:, None]
    first = seq_lens[seq] - (query_start[seq + 1] - query_start[seq]) + start
    positions = jnp.where(real, first[:, None] + offset, -1)
    picked = q.at[jnp.minimum(rows, tokens - 1)].get(mode="promise_in_bounds")
    # [tiles, kv head, tile · group, D]: a kv head's queries are rows of one dot
    group = heads // kv_heads
    picked = picked.reshape(-1, tile, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    picked = picked.reshape(-1, kv_heads, tile * group, dim)
    row_positions = jnp.repeat(positions, group, axis=1)

    def attend(tile_queries, tables, owner, row_positions):
        return _attend(
            tile_queries,
            tables,
            owner,
            row_positions,
            k_pages,
            v_pages,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            decode=max_query_len == 1,
        )

    if free:
        out = attend(picked, block_tables, seq, row_positions)
    else:
        owner = jnp.arange(group_size, dtype=jnp.int32)
        filled = -seq.shape[0] % group_size

        def grouped(x, fill):
            x = jnp.pad(x, ((0, filled), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
            return x.reshape(-1, group_size, *x.shape[1:])

        groups = grouped(picked, 0), grouped(block_tables[seq], TRASH_PAGE), grouped(row_positions, -1)
        out = lax.map(lambda group: attend(group[0], group[1], owner, group[2]), groups)
    out = out.reshape(-1, kv_heads, tile, group, dim).transpose(0, 2, 1, 3, 4).reshape(-1, heads, dim)
    if max_query_len == 1 and tile == 1:
        return out
    # Back from tiles to rows: row t sits in its sequence's tile t // tile.
    target = jnp.where(real, rows, tokens).reshape(-1)
    where = (
        jnp.zeros(tokens + 1, jnp.int32)
        .at[target]
        .set(jnp.arange(target.shape[0], dtype=jnp.int32), mode="drop")
    )
    return out.at[where[:tokens]].get(mode="promise_in_bounds")


def _attend(q, tables, owner, positions, k_pages, v_pages, *, scale, window, soft_cap, decode):
    """q [N, Hkv, R, D] at positions [N, R] → float32 [N, Hkv, R, D]; a row at position −1 sees nothing.

    Tile n's keys are in the pages tables[owner[n]]. With `decode`, a tile's rows share one position, save those at −1.
    """
    count, kv_heads, rows, dim = q.shape
    page = k_pages.shape[2]
    padded = max(rows, 2)
    columns = -(-dim // COLUMN_BLOCK) * COLUMN_BLOCK
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    positions = jnp.pad(positions, ((0, 0), (0, padded - rows)), constant_values=-1)
    last = jnp.max(positions, axis=1)
    pages = (jnp.max(last) + page) // page
    begin = 0
    if window is not None:
        seen = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions)
        begin = jnp.minimum(jnp.maximum(jnp.min(seen) - window + 1, 0) // page, pages)

    def segment(index, state):
        best, total, out = state
        numbers = lax.dynamic_index_in_dim(tables, index, axis=1, keepdims=False)
        keys = k_pages.at[numbers[owner]].get(mode="promise_in_bounds")
        at = index * page + jnp.arange(page, dtype=jnp.int32)
        if decode:
            values = v_pages.at[numbers[owner]].get(mode="promise_in_bounds")
            seen = at[None] <= last[:, None]
            if window is not None:
                seen &= at[None] > last[:, None] - window
            values, sound = jnp.where(seen[:, None, :, None], values, 0), None
        else:
            values = v_pages.at[numbers].get(mode="promise_in_bounds")  # once a sequence, whatever its tiles
            finite = jnp.isfinite(values)
            values = jnp.where(finite, values, 0).at[owner].get(mode="promise_in_bounds")
            sound = pin(jnp.all(finite, axis=3)).at[owner].get(mode="promise_in_bounds")
        # From about 50 rows on XLA sums k in several accumulators unless the columns are a multiple of 64.
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, columns - dim)))
        scores = dot_f32(q, keys, (((3,), (3,)), ((0, 1), (0, 1))))
        scores = pin(scores * scale)
        if soft_cap is not None:
            scores = pin(jnp.tanh(scores / soft_cap) * soft_cap)
        visible = at[None, None] <= positions[..., None]
        if window is not None:
            visible &= at[None, None] > positions[..., None] - window
        if sound is not None:
            scores = jnp.where(sound[:, :, None], scores, jnp.nan)
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        peak = pin(jnp.max(scores, axis=3, keepdims=True))
        probs = pin(jnp.exp(scores - jnp.where(peak == -jnp.inf, 0.0, peak)))
        mass = row_sum(probs.reshape(-1, page)).reshape(*peak.shape)
        part = pin(dot_f32(probs.astype(values.dtype), values, (((3,), (2,)), ((0, 1), (0, 1)))))
        new = jnp.maximum(best, peak)
        old_scale, new_scale = jnp.exp(best - new), jnp.exp(peak - new)
        a, b, c, d = pin(total * old_scale, mass * new_scale, out * old_scale, part * new_scale)
        # By position, not by the peak: it is −inf for seen keys too that are infinite, and their values count.
        overlaps = at[0] <= positions
        if window is not None:
            overlaps &= at[-1] > positions - window
        overlaps = overlaps[:, None, :, None]
        keep = lambda merged, previous: jnp.where(overlaps, merged, previous)  # noqa: E731
        return pin(keep(new, best), keep(a + b, total), keep(c + d, out))

    start = (
        jnp.full((count, kv_heads, padded, 1), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((count, kv_heads, padded, 1), jnp.float32),
        jnp.zeros((count, kv_heads, padded, columns), jnp.float32),
    )
    _, total, out = lax.fori_loop(begin, pages, segment, start)
    out = pin(out / jnp.where(total == 0, 1.0, total))[:, :, :rows, :dim]
    return jnp.where(jnp.all(jnp.isfinite(out), axis=3, keepdims=True), out, jnp.nan)
