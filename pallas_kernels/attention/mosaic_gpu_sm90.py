"""Paged attention on Hopper. Decode and prefill share one contract, spelled out in `online_softmax_sm90`."""

import jax.numpy as jnp

from pallas_kernels.attention.decode_sm90 import decode
from pallas_kernels.attention.prefill_sm90 import prefill, prefill_saving
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
    query_alignment=1,
):
    """See `op.attention`; bfloat16 or float16, head_dim 64, 96, 128 or 256, pages of a multiple of 128 keys.

    With `max_query_len=1`, row s of `q` is the query of sequence s.
    """
    _check(q, k_pages, v_pages)
    options = {"scale": float(scale), "window": window, "soft_cap": soft_cap}
    if max_query_len == 1:
        return decode(q, k_pages, v_pages, block_tables, seq_lens, **options)
    options["query_alignment"] = query_alignment
    return prefill(q, k_pages, v_pages, block_tables, query_start, seq_lens, **options)


def attention_saving(
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
    query_alignment=1,
):
    """(`attention` to the last bit, be it of one query a sequence or many; what its gradient needs besides)"""
    _check(q, k_pages, v_pages)
    options = {"scale": float(scale), "window": window, "soft_cap": soft_cap}
    options["query_alignment"] = query_alignment
    return prefill_saving(q, k_pages, v_pages, block_tables, query_start, seq_lens, **options)


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
