"""Array types in signatures."""

import jax
import numpy as np

HostOrDevice = jax.Array | np.ndarray
"""NumPy before it is passed to a jitted function, JAX inside and after it."""
