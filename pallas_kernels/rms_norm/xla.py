"""RMSNorm for the xla backend: squares, a pinned row sum, then (x · inverse) · weight."""

import jax.numpy as jnp

from pallas_kernels.reduce import pin, row_sum


def rms_norm(x, weight, *, eps):
    """See `op.rms_norm`."""
    wide = pin(x.astype(jnp.float32))
    size = x.shape[1]
    total = row_sum(pin(wide * wide))
    # Adding before scaling leaves no product that a compiler could contract into the sum.
    inverse = 1.0 / jnp.sqrt((total + size * eps) * (1.0 / size))
    return pin(((wide * pin(inverse)) * weight).astype(x.dtype))
