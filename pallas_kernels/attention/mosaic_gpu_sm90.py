"""Paged attention on Hopper. Decode and prefill share one contract, spelled out in `online_softmax_sm90`."""

import jax.numpy as jnp

from pallas_kernels.attention.backward_tiles_sm90 import key_tiles
from pallas_kernels.attention.decode_sm90 import decode
from pallas_kernels.attention.prefill_sm90 import prefill, prefill_saving
from pallas_kernels.attention.query_tiles_sm90 import query_tiles
from pallas_kernels.attention.segments_sm90 import BLOCK, MOST_GROUPED_HEADS
from pallas_kernels.compat import require_hopper


def attention(
    q,
    k_pages,
    v_pages,
    block_tables,
    query_start,
    seq_lens,
    *,
    scale,
    window,
    soft_cap,
    max_query_len,
    tiles=None,
):
    """See `op.attention`; bfloat16 or float16, head_dim 64, 96, 128 or 256, pages of a multiple of 128 keys.

    With `max_query_len=1`, row s of `q` is the query of sequence s. `tiles` is what `batch_tiles` made, if anything.
    """
    _check(q, k_pages, v_pages)
    operands = q, k_pages, v_pages, block_tables, query_start, seq_lens
    options = {"scale": float(scale), "window": window, "soft_cap": soft_cap}
    if max_query_len == 1:
        return decode(*operands[:4], seq_lens, **options)
    queries, _ = tiles or batch_tiles(*operands, window=window)
    return prefill(*operands[:4], queries, **options)


def attention_saving(
    q, k_pages, v_pages, block_tables, query_start, seq_lens, *, scale, window, soft_cap, tiles=None
):
    """(`attention` to the last bit, be it of one query a sequence or many; what its gradient needs besides)"""
    _check(q, k_pages, v_pages)
    operands = q, k_pages, v_pages, block_tables, query_start, seq_lens
    options = {"scale": float(scale), "window": window, "soft_cap": soft_cap}
    tiles = tiles or batch_tiles(*operands, window=window)
    out, kept = prefill_saving(*operands[:4], tiles[0], **options)
    return out, (*tiles, *kept)


def batch_tiles(q, k_pages, v_pages, block_tables, query_start, seq_lens, *, window, query_alignment=1):
    """The tiles of queries, and those of keys for the gradient: (QueryTiles, KeyTiles), of the indices alone."""
    _check(q, k_pages, v_pages)
    block_tables, query_start, seq_lens = map(jnp.asarray, (block_tables, query_start, seq_lens))
    tiles = query_tiles(query_start, seq_lens, q.shape[0], q.shape[2], query_alignment)
    pool = k_pages.shape[0], k_pages.shape[2]
    return tiles, key_tiles(block_tables, query_start, seq_lens, tiles.begin, pool, tiles.tile, window)


def _check(q, k_pages, v_pages):
    require_hopper("attention")
    dim, page, group = q.shape[2], k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(
            f"attention: q is {q.dtype} and the cache {k_pages.dtype}; mosaic_gpu takes bfloat16 or float16; "
            "use backend='xla'"
        )
    if dim not in BLOCK or page % 128 or group > MOST_GROUPED_HEADS:
        raise ValueError(
            f"attention: head_dim={dim}, page={page}, {group} query heads a KV head; mosaic_gpu takes "
            f"head_dim {', '.join(map(str, BLOCK))}, pages of a multiple of 128 "
            f"and groups up to {MOST_GROUPED_HEADS}; use backend='xla'"
        )
