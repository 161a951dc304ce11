"""What the host tells a step, in one array: each array of its own costs the host some 30 µs on a GPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

ALIGN = 64
"""Every part begins at a multiple of 256 bytes. XLA hands a part to a kernel as it lies in the vector, without a copy;
it looks at the part's size alone, and Mosaic refuses any other address."""

Layout = tuple[Any, tuple[tuple[tuple[int, ...], str], ...]]
"""A tree's structure, and the shape and dtype of its leaves."""


def layout_of(tree: Any) -> Layout:
    """How a tree of arrays, or of their shapes, is packed.

    Raises:
        ValueError: an array has no 32-bit numbers.
    """
    leaves, structure = jax.tree.flatten(tree)
    for x in leaves:
        if np.dtype(x.dtype).itemsize != 4:
            raise ValueError(f"an array of {x.dtype} can't be packed; use int32, uint32 or float32")
    return structure, tuple((tuple(x.shape), str(np.dtype(x.dtype))) for x in leaves)


def pack(tree: Any) -> Any:
    """All numbers of a tree of NumPy arrays in one int32 vector, by their bits; of shapes, its shape."""
    leaves = jax.tree.leaves(tree)
    size = sum(_room(x.size) for x in leaves)
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((size,), jnp.int32)
    vector, at = np.zeros(size, np.int32), 0
    for x in leaves:
        vector[at : at + x.size] = np.ravel(x).view(np.int32)
        at += _room(x.size)
    return vector


def unpack(vector: Int[Array, " n"], layout: Layout) -> Any:
    """The inverse of `pack`, in a program."""
    structure, kinds = layout
    leaves, at = [], 0
    for shape, dtype in kinds:
        size = math.prod(shape)
        part = vector[at : at + size].reshape(shape)
        leaves.append(part if dtype == "int32" else lax.bitcast_convert_type(part, dtype))
        at += _room(size)
    return jax.tree.unflatten(structure, leaves)


def _room(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
