"""A digest of a model's weights, fast enough to take at every start."""

import hashlib

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt32

BLOCK = 2**20
"""Elements mixed at once: all of an embedding's would take twice its memory."""


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
    x = x.reshape(-1, x.shape[-1])
    rows, width = x.shape
    step = min(rows, max(1, BLOCK // width))

    def add(i, sums):
        start = jnp.minimum(i * step, rows - step)  # the last block reaches back over rows already counted
        block = lax.dynamic_slice_in_dim(x, start, step)
        bits = lax.bitcast_convert_type(block, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        row = start + lax.broadcasted_iota(jnp.int32, bits.shape, 0)
        index = row.astype(jnp.uint32) * width + lax.broadcasted_iota(jnp.uint32, bits.shape, 1)
        mixed = (_mix(bits ^ _mix(index + jnp.uint32(lane))) for lane in (0x9E3779B9, 0x3C6EF372))
        return sums + jnp.stack([jnp.sum(jnp.where(row >= i * step, m, 0), dtype=jnp.uint32) for m in mixed])

    return lax.fori_loop(0, -(-rows // step), add, jnp.zeros(2, jnp.uint32))


def _mix(h):
    """MurmurHash3's finaliser, a bijection."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
