"""Gradient of paged attention, by backend: `backward_xla` and `backward_sm90`."""

import jax.numpy as jnp

from pallas_kernels import registry


def attention(static, operands, d_out):
    """Cotangents of (q, k_pages, v_pages, block_tables, query_start, seq_lens)."""
    scale, window, soft_cap, _, backend = static
    tensors, indices = operands[:3], map(jnp.asarray, operands[3:])
    gradient = registry.load_backward("attention", backend).attention
    return (
        *gradient(*tensors, *indices, d_out, scale=scale, window=window, soft_cap=soft_cap),
        None,
        None,
        None,
    )
