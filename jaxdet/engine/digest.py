"""A digest of a model's weights, fast enough to take at every start."""

import hashlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32


def weights_digest(state) -> str:
    """Digest over names, shapes, dtypes and every bit of a tree of arrays; reads them where they are.

    Each element is mixed with its index and the results are summed as integers, which no order can change. One
    changed element always shows; it isn't made to withstand an attacker.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    sums = jax.device_get([_fingerprint(leaf) for _, leaf in leaves])
    total = hashlib.sha256()
    for (path, leaf), value in zip(leaves, sums, strict=True):
        total.update(f"{jax.tree_util.keystr(path)}/{leaf.dtype}/{leaf.shape}/".encode() + value.tobytes())
    return total.hexdigest()


@jax.jit
def _fingerprint(x: Shaped[Array, "..."]) -> UInt32[Array, " 2"]:
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index, stride = jnp.zeros_like(bits), 1
    for axis in reversed(range(x.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    mixed = [_mix(bits ^ _mix(index + jnp.uint32(lane))) for lane in (0x9E3779B9, 0x3C6EF372)]
    return jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in mixed])


def _mix(h):
    """MurmurHash3's finaliser, a bijection."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
