"""What the TPU kernels share: the dtypes they take, the sizes of a register tile and how the KV cache lies in HBM.

XLA lays an array out so that tiles of 128 lanes waste least. Pages of [128 keys, D] with D a multiple of 128 lie as
they are; others lie transposed, keys along the lanes, and a kernel that asked for the other way would have the whole
cache copied at every call.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compat import pltpu

LANES = 128
"""Columns of a register; the last axis of a tile is a multiple of it."""

VMEM_LIMIT = 56 * 2**20
"""Bytes of vector memory that a kernel may ask for: v5p and tpu7x have 64 MiB a core."""


def require_dtype(what: str, dtype) -> None:
    """Raises ValueError for a dtype that TPUs don't multiply."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"{what} is {np.dtype(dtype).name}; mosaic_tpu takes float32 or bfloat16; use backend='xla'"
        )


def lies_transposed(head_dim: int) -> bool:
    """Whether XLA keeps pages of [128 keys, head_dim] as [head_dim, 128 keys]."""
    return head_dim % LANES != 0


def as_stored(pages, head_dim: int):
    """[P, Hkv, page, D] as XLA keeps it in HBM, so that nothing is moved; its own inverse."""
    return pages.swapaxes(2, 3) if lies_transposed(head_dim) else pages


def in_hbm(pages, head_dim: int):
    """`as_stored`, and kept there: XLA moves a pool that fits VMEM into it otherwise, and out again, every call."""
    return pltpu.with_memory_space_constraint(as_stored(pages, head_dim), pltpu.HBM)


def dot(a, b, dimensions):
    """`lax.dot_general` to float32, every bit of float32 operands used."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
