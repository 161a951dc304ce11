"""Array types in signatures, and their sizes."""

import jax
import numpy as np

HostOrDevice = jax.Array | np.ndarray
"""NumPy before it is passed to a jitted function, JAX inside and after it."""


def round_up(value: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-value // unit) * unit
