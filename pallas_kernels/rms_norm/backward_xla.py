"""RMSNorm's gradient in XLA."""

import jax.numpy as jnp

from pallas_kernels.gradient import add_rows, live_rows
from pallas_kernels.reduce import pin, row_sum


def rms_norm(x, weight, total, dy, eps, *, each: int = 1):
    """(dx in x's dtype, total + the weight's gradient); `each` rows belong together as one of the sum's."""
    dx, parts = _through_norm(x, weight, dy, eps)
    return dx.astype(x.dtype), add_rows(total, parts.reshape(-1, each, x.shape[1]))


def _through_norm(x, weight, dy, eps):
    """(dx, x · i · dy) in float32: dx = i · (g − x · i · mean(g · x · i)), g = dy · weight, i = 1/√(mean x² + eps).

    The second, added up over rows, is the weight's gradient. Both are 0 in rows without a gradient, be x NaN.

    Every step is an operation that IEEE defines or a pinned sum, so that no bit depends on the number of rows.
    """
    x, g = pin(x.astype(jnp.float32)), pin(dy.astype(jnp.float32) * weight)
    size = x.shape[-1]
    inverse = pin(1.0 / jnp.sqrt((row_sum(pin(x * x)) + size * eps) * (1.0 / size)))
    normal = pin(x * inverse)
    mean = row_sum(pin(g * normal)) * (1.0 / size)
    dx = pin((g - pin(normal * mean)) * inverse)
    live = live_rows(dy)
    return jnp.where(live, dx, 0), pin(jnp.where(live, normal * dy.astype(jnp.float32), 0))
