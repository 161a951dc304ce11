"""What the Mosaic kernels of both chips share: noise and ordered keys in int32, whose sums wrap as uint32's do."""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample.op import SamplingRows
from pallas_kernels.sample.xla import INT32_MAX, threefry2x32

LOWEST, HIGHEST = -(2**31) + 2**23 - 1, 2**31 - 2**23
"""The keys of −inf and +inf; see `from_key`."""


def from_key(key):
    """The float32 that the int32 `key` stands for: float order is key order, with −0 just below +0."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ jnp.int32(INT32_MAX), key), jnp.float32)


def to_key(x):
    """The int32 that `from_key` makes `x` of."""
    key = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(key < 0, key ^ jnp.int32(INT32_MAX), key)


def noise_keys(rows: SamplingRows):
    """Of every row the two int32 [S] that its noise grows from."""
    keys = threefry2x32(
        (rows.seed[:, 0], rows.seed[:, 1]),
        (rows.sample_index.astype(jnp.uint32), rows.position.astype(jnp.uint32)),
    )
    return tuple(lax.bitcast_convert_type(key, jnp.int32) for key in keys)


def gumbel(ids, key):
    """`xla.gumbel` of the tokens `ids`, from a row's two keys."""

    def rotate(x, turn):
        return (x << turn) | lax.shift_right_logical(x, jnp.full_like(x, 32 - turn))

    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.int32(0x1BD11BDA))
    x, y = ids + k0, jnp.broadcast_to(k1, ids.shape)
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = rotate(y, turn) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.int32(group + 1)
    bits = lax.shift_right_logical(x, jnp.full_like(x, 9))
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))
