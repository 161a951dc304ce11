"""Gradient of paged attention: tiles of one sequence's queries, each over its keys' pages, in ascending order.

As in FlashAttention-2 (Dao 2023, section 3.1), with p recomputed from the scores: dv += pᵀ·do, ds = p ∘ (do·vᵀ − Δ)
with Δ = Σ do ∘ o, dq += ds·k, dk += dsᵀ·q. A tile's dq adds up over ascending pages, a page's dk and dv over ascending
tiles, all in float32; every dot has one shape, whatever the batch.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.tiles import tiles
from pallas_kernels.numerics import GRADIENT_ROWS
from pallas_kernels.reduce import dot_f32, pin, row_sum


def forward(kernel, q, k_pages, v_pages, block_tables, query_start, seq_lens, _tiles, **options):
    """(the kernel's result, nothing else)."""
    return kernel.attention(q, k_pages, v_pages, block_tables, query_start, seq_lens, **options), None


def attention(q, k_pages, v_pages, block_tables, query_start, seq_lens, _, d_out, *, scale, window, soft_cap):
    """(dq, dk, dv) in the dtypes and shapes of q, k_pages and v_pages; nothing is saved in the forward pass."""
    tokens, heads, dim = q.shape
    kv_heads, page = k_pages.shape[1:3]
    group, tile = heads // kv_heads, GRADIENT_ROWS

    def one_tile(sums, where):
        owner, start = where
        rows = query_start[owner] + start + jnp.arange(tile, dtype=jnp.int32)
        real = rows < query_start[owner + 1]
        rows = jnp.minimum(rows, tokens - 1)
        first = seq_lens[owner] - (query_start[owner + 1] - query_start[owner]) + start
        positions = jnp.where(real, first + jnp.arange(tile, dtype=jnp.int32), -1)
        last = jnp.max(positions)
        pages = jnp.where(last < 0, 0, last // page + 1)
        begin = 0
        if window is not None:
            begin = jnp.minimum(jnp.maximum(first - window + 1, 0) // page, pages)

        def pick(x):
            """[tile · group] rows of every KV head, those that aren't real cleared."""
            x = jnp.where(real[:, None, None], x.at[rows].get(mode="promise_in_bounds"), 0)
            x = x.reshape(tile, kv_heads, group, dim).transpose(1, 0, 2, 3)
            return x.reshape(kv_heads, tile * group, dim)

        queries, d_tile = pick(q), pick(d_out)

        def fetch(index):
            """Keys and values of a page, cleared where the sequence has none; their positions and page number."""
            number = block_tables[owner, index]
            at = index * page + jnp.arange(page, dtype=jnp.int32)
            inside = (at <= last)[None, :, None]
            return *(jnp.where(inside, x[number], 0) for x in (k_pages, v_pages)), at, number

        def scores_of(keys, at):
            """(capped and masked scores, their slope by the products q·k)"""
            scores = pin(dot_f32(queries, keys, (((2,), (2,)), ((0,), (0,)))) * scale)
            slope = scale
            if soft_cap is not None:
                bent = pin(jnp.tanh(scores / soft_cap))
                scores, slope = pin(bent * soft_cap), pin((1.0 - pin(bent * bent)) * scale)
            visible = at[None] <= positions[:, None]
            if window is not None:
                visible &= at[None] > positions[:, None] - window
            return jnp.where(jnp.repeat(visible, group, axis=0)[None], scores, -jnp.inf), slope

        def normaliser(index, state):
            best, total, out = state
            keys, values, at, _ = fetch(index)
            scores, _ = scores_of(keys, at)
            peak = jnp.maximum(best, pin(jnp.max(scores, axis=2, keepdims=True)))
            probs = pin(jnp.exp(scores - peak))
            mass = row_sum(probs.reshape(-1, page)).reshape(peak.shape)
            part = pin(dot_f32(probs, values.astype(jnp.float32), (((2,), (1,)), ((0,), (0,)))))
            decay = pin(jnp.exp(best - peak))
            old_total, old_out = pin(total * decay, out * decay)
            return pin(peak, old_total + mass, old_out + part)

        shape = kv_heads, tile * group
        empty = (
            jnp.full((*shape, 1), jnp.finfo(jnp.float32).min, jnp.float32),
            jnp.zeros((*shape, 1), jnp.float32),
            jnp.zeros((*shape, dim), jnp.float32),
        )
        best, total, out = lax.fori_loop(begin, pages, normaliser, empty)
        total = jnp.where(total == 0, 1.0, total)
        out = pin(out / total)
        delta = row_sum(pin(d_tile.astype(jnp.float32) * out).reshape(-1, dim)).reshape(*shape, 1)

        def through(index, state):
            dq, dk_sum, dv_sum = state
            keys, values, at, number = fetch(index)
            scores, slope = scores_of(keys, at)
            probs = pin(jnp.exp(scores - best) / total)
            narrow = probs.astype(q.dtype)
            dv = pin(dot_f32(narrow, d_tile, (((1,), (1,)), ((0,), (0,)))))
            d_probs = pin(dot_f32(d_tile, values, (((2,), (2,)), ((0,), (0,)))))
            d_scores = pin(pin(probs * pin(d_probs - delta)) * slope).astype(q.dtype)
            dk = pin(dot_f32(d_scores, queries, (((1,), (1,)), ((0,), (0,)))))
            part = pin(dot_f32(d_scores, keys, (((2,), (1,)), ((0,), (0,)))))
            dk_sum = dk_sum.at[number].set(pin(dk_sum[number] + dk))
            dv_sum = dv_sum.at[number].set(pin(dv_sum[number] + dv))
            return pin(dq + part), dk_sum, dv_sum

        zeros = jnp.zeros((*shape, dim), jnp.float32)
        dq, *sums = lax.fori_loop(begin, pages, through, (zeros, *sums))
        dq = dq.reshape(kv_heads, tile, group, dim).transpose(1, 0, 2, 3).reshape(tile, heads, dim)
        return tuple(sums), (dq.astype(q.dtype), jnp.where(real, rows, tokens))

    count = min(tokens, -(-tokens // tile) + seq_lens.shape[0])
    where = tiles(query_start, tile, count)
    start = tuple(jnp.zeros(pages.shape, jnp.float32) for pages in (k_pages, v_pages))
    (dk, dv), (dq, rows) = lax.scan(one_tile, start, where)
    dq = jnp.zeros_like(q).at[rows.reshape(-1)].set(dq.reshape(-1, heads, dim), mode="drop")
    return dq, dk.astype(k_pages.dtype), dv.astype(v_pages.dtype)
