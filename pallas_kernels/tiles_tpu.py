"""What the TPU kernels share: the dtypes they take and the sizes of a register tile."""

import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128
"""Columns of a register; the last axis of a tile is a multiple of it."""


def require_dtype(what: str, dtype) -> None:
    """Raises ValueError for a dtype that TPUs don't multiply."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"{what} is {np.dtype(dtype).name}; mosaic_tpu takes float32 or bfloat16; use backend='xla'"
        )


def dot(a, b, dimensions):
    """`lax.dot_general` to float32, every bit of float32 operands used."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit
