"""Gradient of RMSNorm."""

import jax.numpy as jnp

from pallas_kernels.gradient import add_rows, cotangent, live_rows, sum_so_far, value_of
from pallas_kernels.reduce import pin, row_sum


def rms_norm(static, operands, dy):
    """Cotangents of (x, weight)."""
    eps, _ = static
    x, weight = operands
    dx, normal = through_norm(x, value_of(weight), dy, eps)
    parts = jnp.where(live_rows(dy), normal * dy.astype(jnp.float32), 0)
    return dx.astype(x.dtype), cotangent(weight, add_rows(sum_so_far(weight), pin(parts)))


def through_norm(x, weight, dy, eps):
    """(dx, x · i) in float32: dx = i · (g − x · i · mean(g · x · i)), g = dy · weight, i = 1/√(mean x² + eps).

    Every step is an operation that IEEE defines or a pinned sum, so that no bit depends on the number of rows.
    """
    x, g = pin(x.astype(jnp.float32)), pin(dy.astype(jnp.float32) * weight)
    size = x.shape[-1]
    inverse = pin(1.0 / jnp.sqrt((row_sum(pin(x * x)) + size * eps) * (1.0 / size)))
    normal = pin(x * inverse)
    mean = row_sum(pin(g * normal)) * (1.0 / size)
    dx = pin((g - pin(normal * mean)) * inverse)
    return jnp.where(live_rows(dy), dx, 0), normal
