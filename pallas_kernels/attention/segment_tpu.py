"""The arithmetic of attention on TPUs; every line of it is part of the contract.

For a sub-tile's rows against one page of 128 keys, in float32:

    s = scale · q·kᵀ, one MXU dot over D (then cap · tanh(s / cap)), −inf where the mask says so
    m = max s;  p = e^(s − m);  l = Σp in Mosaic's tree for 128 lanes;  o = round(p)·v, one MXU dot over the keys
    M′ = max(M, m);  a = e^(M − M′);  b = e^(m − M′);  L = L·a + l·b;  O = O·a + o·b

and O / L at the end, with −0 made +0, so that a page without a visible key is an exact no-op wherever it is skipped.
A page does not know the state it is merged into: pages may be computed anywhere, as long as they merge in order.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import round_up
from pallas_kernels.tiles_tpu import dot, lies_transposed

MAX_HEAD_DIM = 256

ROWS = 64
"""Rows of a sub-tile, nearly: enough to keep the MXU busy, few enough that a decode step stays bound by memory."""

ROWS_MULTIPLE = 16
"""Sublanes of a bfloat16 tile."""


def sub_tile(group: int) -> tuple[int, int]:
    """(tokens, rows) of a sub-tile when `group` query heads share a KV head."""
    tokens = max(1, ROWS // group)
    return tokens, round_up(tokens * group, ROWS_MULTIPLE)


def segment(q, keys, values, position, first_key, state, *, scale, window, soft_cap):
    """(M, L, O) with one more page.

    Args:
        q: [Hkv, R, D].
        keys, values: a page as it lies in HBM, [Hkv, 128, D] or [Hkv, D, 128].
        position: of every row's query, int32 [R, 128], alike in all lanes.
        first_key: position of the page's first key.
        state: M and L [Hkv, R, 1], O [Hkv, R, D].
    """
    best, total, out = state
    by_key, by_dim = (1, 2) if lies_transposed(q.shape[2]) else (2, 1)
    scores = dot(q, keys, (((2,), (by_key,)), ((0,), (0,)))) * scale
    if soft_cap is not None:
        scores = jnp.tanh(scores / soft_cap) * soft_cap
    key = lax.broadcasted_iota(jnp.int32, position.shape, 1) + first_key
    visible = key <= position
    if window is not None:
        visible &= key > position - window
    scores = jnp.where(visible[None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=2, keepdims=True)
    probs = jnp.exp(scores - jnp.where(peak == -jnp.inf, 0.0, peak))
    mass = jnp.sum(probs, axis=2, keepdims=True)
    part = dot(probs.astype(values.dtype), values, (((2,), (by_dim,)), ((0,), (0,))))
    new = jnp.maximum(best, peak)
    a, b = jnp.exp(best - new), jnp.exp(peak - new)
    return new, total * a + mass * b, out * a + part * b


def finish(out, total):
    """O / L in float32; zero for rows that saw no key."""
    out = out / jnp.where(total == 0.0, 1.0, total)
    return jnp.where(out == 0.0, 0.0, out)
