"""Gradient of q/k norm, RoPE and the cache write, a chunk of tokens at a time."""

import jax.numpy as jnp

from pallas_kernels.gradient import cotangent, row_total, sum_so_far, value_of
from pallas_kernels.reduce import pin
from pallas_kernels.rms_norm.backward import through_norm
from pallas_kernels.rows import over_rows


def rope_cache(static, operands, cotangents):
    """Cotangents of (qkv, k_pages, v_pages, rope, positions, slots, q_norm, k_norm); none for the angles."""
    num_q_heads, num_kv_heads, eps, _ = static
    qkv, k_pages, _, rope, positions, slots, q_norm, k_norm = operands
    dq, dk_pages, dv_pages = cotangents
    page_size, dim = k_pages.shape[2:]

    def chunk(sums, qkv, positions, slots, dq):
        written = slots // page_size, slice(None), slots % page_size
        dk = dk_pages.at[written].get(mode="promise_in_bounds")
        dv = dv_pages.at[written].get(mode="promise_in_bounds")
        angles = rope.at[positions].get(mode="promise_in_bounds")[:, None]
        q, k = jnp.split(
            qkv.reshape(-1, qkv.shape[-1] // dim, dim)[:, : num_q_heads + num_kv_heads], [num_q_heads], axis=1
        )
        dq, q_sum = _through_norm(q, q_norm, _rotate_back(dq, angles), eps, sums[0])
        dk, k_sum = _through_norm(k, k_norm, _rotate_back(dk, angles), eps, sums[1])
        d_qkv = jnp.concatenate([dq, dk, dv.astype(jnp.float32)], axis=1)
        return (q_sum, k_sum), d_qkv.reshape(qkv.shape).astype(qkv.dtype)

    # Surplus rows of the last chunk read the trash page and position 0, and are cut off.
    starts = tuple(None if norm is None else sum_so_far(norm) for norm in (q_norm, k_norm))
    sums, d_qkv = over_rows(chunk, starts, qkv, positions, slots, dq)
    d_norms = (
        None if norm is None or sum is None else cotangent(norm, sum)
        for norm, sum in zip((q_norm, k_norm), sums, strict=True)
    )
    # What was in the slots before is gone, and so is its gradient.
    overwritten = slots // page_size, slice(None), slots % page_size
    d_before = (pages.at[overwritten].set(0, mode="promise_in_bounds") for pages in (dk_pages, dv_pages))
    return d_qkv, *d_before, None, None, None, *d_norms


def _through_norm(x, weight, dy, eps, sum):
    """(dx, the norm weight's sum) of heads [T, heads, D]; without a norm dy itself."""
    if weight is None:
        return dy, None
    _, heads, dim = x.shape
    dx, normal = through_norm(x.reshape(-1, dim), value_of(weight), dy.reshape(-1, dim), eps)
    parts = pin(normal.reshape(x.shape) * dy)
    for head in range(heads):
        sum = pin(sum + row_total(parts[:, head]))
    return dx.reshape(x.shape), sum


def _rotate_back(dy, angles):
    """RoPE by the opposite angle, every product rounded before the sum; float32."""
    dy = dy.astype(jnp.float32)
    half = dy.shape[-1] // 2
    cos, sin = angles[..., :half], angles[..., half:]
    first, second = dy[..., :half], dy[..., half:]
    a, b, c, d = pin(first * cos, second * sin, second * cos, first * sin)
    return pin(jnp.concatenate([a + b, c - d], axis=-1))
