"""Gradient of RMSNorm, a chunk of rows at a time."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.gradient import cotangent, row_total, sum_so_far, value_of
from pallas_kernels.reduce import pin, row_sum
from pallas_kernels.rows import over_rows


def rms_norm(static, operands, dy):
    """Cotangents of (x, weight)."""
    eps, _ = static
    x, weight = operands

    def chunk(sum, x, dy):
        dx, normal = through_norm(x, value_of(weight), dy, eps)
        return pin(sum + row_total(pin(normal * dy.astype(jnp.float32)))), dx.astype(x.dtype)

    d_weight, dx = over_rows(chunk, sum_so_far(weight), x, dy)
    return dx, cotangent(weight, d_weight)


def through_norm(x, weight, dy, eps):
    """(dx, x · i) in float32: dx = i · (g − x · i · mean(g · x · i)), g = dy · weight, i = 1/√(mean x² + eps)."""
    x, g = pin(x.astype(jnp.float32)), pin(dy.astype(jnp.float32) * weight)
    size = x.shape[-1]
    inverse = pin(lax.rsqrt((row_sum(pin(x * x)) + size * eps) * (1.0 / size)))
    normal = pin(x * inverse)
    mean = row_sum(pin(g * normal)) * (1.0 / size)
    return pin((g - pin(normal * mean)) * inverse), normal
