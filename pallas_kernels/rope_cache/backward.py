"""Gradient of q/k norm, RoPE and the cache write."""

import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.gradient import cotangent, sum_so_far, value_of
from pallas_kernels.reduce import pin


def rope_cache(static, operands, cotangents):
    """Cotangents of (qkv, k_pages, v_pages, rope, positions, slots, q_norm, k_norm); none for the angles."""
    num_q_heads, num_kv_heads, eps, backend = static
    qkv, k_pages, _, rope, positions, slots, q_norm, k_norm = operands
    dq, dk_pages, dv_pages = cotangents
    page_size, dim = k_pages.shape[2:]

    written = slots // page_size, slice(None), slots % page_size
    dk = dk_pages.at[written].get(mode="promise_in_bounds")
    dv = dv_pages.at[written].get(mode="promise_in_bounds")
    angles = rope.at[positions].get(mode="promise_in_bounds")[:, None]
    heads = qkv.reshape(-1, qkv.shape[-1] // dim, dim)[:, : num_q_heads + num_kv_heads]
    q, k = jnp.split(heads, [num_q_heads], axis=1)
    dq, d_q_norm = _through_norm(q, q_norm, _rotate_back(dq, angles), eps, backend)
    dk, d_k_norm = _through_norm(k, k_norm, _rotate_back(dk, angles), eps, backend)
    d_qkv = jnp.concatenate([x.astype(qkv.dtype) for x in (dq, dk, dv)], axis=1).reshape(qkv.shape)
    # What was in the slots before is gone, and so is its gradient.
    d_before = (pages.at[written].set(0, mode="promise_in_bounds") for pages in (dk_pages, dv_pages))
    return d_qkv, *d_before, None, None, None, d_q_norm, d_k_norm


def _through_norm(x, weight, dy, eps, backend):
    """(dx, the norm weight's cotangent) of heads [T, heads, D]; without a norm dy itself."""
    if weight is None:
        return dy, None
    _, heads, dim = x.shape
    gradient = registry.load_backward("rms_norm", backend).rms_norm
    x2, dy = x.reshape(-1, dim), dy.reshape(-1, dim)
    dx, total = gradient(x2, value_of(weight), sum_so_far(weight), dy, eps, each=heads)
    return dx.reshape(x.shape), cotangent(weight, total)


def _rotate_back(dy, angles):
    """RoPE by the opposite angle, every product rounded before the sum; float32."""
    dy = dy.astype(jnp.float32)
    half = dy.shape[-1] // 2
    cos, sin = angles[..., :half], angles[..., half:]
    first, second = dy[..., :half], dy[..., half:]
    a, b, c, d = pin(first * cos, second * sin, second * cos, first * sin)
    return pin(jnp.concatenate([a + b, c - d], axis=-1))
