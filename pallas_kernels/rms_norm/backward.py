"""Gradient of RMSNorm, by backend: `backward_xla` and `backward_sm90`."""

from pallas_kernels import registry
from pallas_kernels.gradient import cotangent, sum_so_far, value_of


def rms_norm(static, operands, dy):
    """Cotangents of (x, weight)."""
    eps, backend = static
    x, weight = operands
    gradient = registry.load_backward("rms_norm", backend).rms_norm
    dx, total = gradient(x, value_of(weight), sum_so_far(weight), dy, eps)
    return dx, cotangent(weight, total)
