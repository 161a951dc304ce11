"""Rows of arrays, a chunk of one shape at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.arrays import round_up
from pallas_kernels.numerics import GRADIENT_ROWS


def over_rows[Carry](
    body: Callable[..., tuple[Carry, Any]], carry: Carry, *arrays: Array, size: int = GRADIENT_ROWS
) -> tuple[Carry, Any]:
    """Scans `body(carry, *chunks) -> (carry, outputs)` over chunks of `size` rows, in ascending order.

    The last chunk is filled up with zeros; surplus rows of the outputs are cut off.
    """
    rows = arrays[0].shape[0]
    filled = round_up(rows, size)

    def cut(x):
        x = jnp.pad(x, ((0, filled - rows), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(filled // size, size, *x.shape[1:])

    carry, outputs = lax.scan(lambda so_far, chunk: body(so_far, *chunk), carry, tuple(map(cut, arrays)))
    return carry, jax.tree.map(lambda y: y.reshape(filled, *y.shape[2:])[:rows], outputs)
