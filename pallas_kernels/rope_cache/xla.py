"""Query/key norm, RoPE and cache write for the xla backend."""

import jax.numpy as jnp

from pallas_kernels.reduce import pin
from pallas_kernels.rms_norm.xla import rms_norm


def rope_cache(
    qkv, k_pages, v_pages, rope, positions, slots, *, num_q_heads, num_kv_heads, q_norm, k_norm, eps
):
    """See `op.rope_cache`."""
    tokens = qkv.shape[0]
    page_size, head_dim = k_pages.shape[2:]
    q, k, v = jnp.split(qkv.reshape(tokens, -1, head_dim), [num_q_heads, num_q_heads + num_kv_heads], axis=1)
    angles = rope.at[positions].get(mode="promise_in_bounds")[:, None]
    q, k = _rotate(_norm(q, q_norm, eps), angles), _rotate(_norm(k, k_norm, eps), angles)
    page, offset = slots // page_size, slots % page_size
    k_pages = k_pages.at[page, :, offset].set(k.astype(k_pages.dtype), mode="promise_in_bounds")
    v_pages = v_pages.at[page, :, offset].set(v.astype(v_pages.dtype), mode="promise_in_bounds")
    return q.astype(qkv.dtype), k_pages, v_pages


def _norm(x, weight, eps):
    wide = x.astype(jnp.float32)
    if weight is None:
        return wide
    return rms_norm(wide.reshape(-1, x.shape[-1]), weight, eps=eps).reshape(x.shape)


def _rotate(x, angles):
    half = x.shape[-1] // 2
    cos, sin = angles[..., :half], angles[..., half:]
    first, second = x[..., :half], x[..., half:]
    a, b, c, d = pin(first * cos, second * sin, second * cos, first * sin)
    return pin(jnp.concatenate([a - b, c + d], axis=-1))
