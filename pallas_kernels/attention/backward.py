"""Gradient of paged attention, by backend: `backward_xla` and `backward_sm90`."""

import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.backend import resolve


def saving(static, *operands):
    """(attention's result, what its gradient needs besides the operands): nothing, save on Hopper."""
    scale, window, soft_cap, max_query_len, backend = static
    *operands, tiles = *operands[:3], *map(jnp.asarray, operands[3:6]), operands[6]
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    module = registry.load("attention", backend)
    if resolve(backend) == "mosaic_gpu":
        return module.attention_saving(*operands, **options, tiles=tiles)
    return module.attention(*operands, **options, max_query_len=max_query_len), None


def attention(static, operands, saved, d_out):
    """Cotangents of (q, k_pages, v_pages, block_tables, query_start, seq_lens, tiles)."""
    scale, window, soft_cap, _, backend = static
    tensors, indices = operands[:3], map(jnp.asarray, operands[3:6])
    gradient = registry.load_backward("attention", backend).attention
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    return (*gradient(*tensors, *indices, saved, d_out, **options), None, None, None, None)
