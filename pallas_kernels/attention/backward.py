"""Gradient of paged attention, by backend: `backward_xla` and `backward_sm90`."""

import jax.numpy as jnp

from pallas_kernels import registry


def forward(static, *operands):
    """(attention's result, what its gradient wants of it)."""
    scale, window, soft_cap, max_query_len, backend = static
    operands = *operands[:3], *map(jnp.asarray, operands[3:6]), operands[6]
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "max_query_len": max_query_len}
    kernel = registry.load("attention", backend)
    return registry.load_backward("attention", backend).forward(kernel, *operands, **options)


def attention(static, operands, saved, d_out):
    """Cotangents of (q, k_pages, v_pages, block_tables, query_start, seq_lens, tiles)."""
    scale, window, soft_cap, _, backend = static
    tensors, indices = operands[:3], map(jnp.asarray, operands[3:6])
    gradient = registry.load_backward("attention", backend).attention
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    return (*gradient(*tensors, *indices, saved, d_out, **options), None, None, None, None)
