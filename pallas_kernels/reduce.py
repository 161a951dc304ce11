"""Row sums in an order that depends on the row length alone, and XLA's own dot (xla backend)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.numerics import REDUCE_LANES, WIDE_REDUCE_FROM, WIDE_REDUCE_LANES


def pin(*values):
    """Stops XLA from fusing across this point, so that neither fusion nor FMA contraction depends on context."""
    out = lax.optimization_barrier(values)
    return out[0] if len(values) == 1 else out


def row_sum(x: Float[Array, "M N"]) -> Float[Array, "M 1"]:
    """Sum over the last axis, as elementwise adds only: XLA may not reorder them.

    Element i belongs to lane i % L with L = 64 (1024 above 8192 elements). Each lane adds up in ascending i; then
    the upper half of the lanes is added to the lower half until one is left.
    """
    n = x.shape[1]
    lanes = WIDE_REDUCE_LANES if n > WIDE_REDUCE_FROM else REDUCE_LANES
    groups = -(-n // lanes)
    x = jnp.pad(x, ((0, 0), (0, groups * lanes - n)))
    if lanes == REDUCE_LANES:
        total = x[:, :lanes]
        for g in range(1, groups):
            total = total + x[:, g * lanes : (g + 1) * lanes]
    else:

        def add(g, total):
            return total + lax.dynamic_slice_in_dim(x, g * lanes, lanes, axis=1)

        total = lax.fori_loop(1, groups, add, x[:, :lanes])
    total = pin(total)
    while lanes > 1:
        lanes //= 2
        total = total[:, :lanes] + total[:, lanes:]
        if lanes in (256, 32, 4):
            total = pin(total)  # keeps the nest of additions inside one fusion small
    return pin(total)


def log_sum_exp(x: Float[Array, "M N"]) -> tuple[Float[Array, "M 1"], Float[Array, "M 1"]]:
    """(max, log Σ exp(x − max)) over the last axis; −inf entries are exact no-ops."""
    peak = pin(jnp.max(x, axis=1, keepdims=True))
    total = row_sum(pin(jnp.exp(pin(x - peak))))
    return peak, pin(jnp.log(total))


def dot_f32(a, b, dims):
    """`lax.dot_general` with products and sums in float32, whatever precision the process asks for."""
    return lax.dot_general(a, b, dims, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
