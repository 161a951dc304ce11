"""RMSNorm on TPUs: tiles of TILE rows, whatever their number.

Σx² in Mosaic's tree for a [TILE, H] tile, then x · 1/√((Σx² + H·eps) / H) · weight in float32, rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, pltpu
from pallas_kernels.tiles_tpu import require_dtype

TILE = 16
"""Rows computed at once: a bfloat16 tile's sublanes."""

BLOCK = 128
"""Rows fetched at once, at most."""


def rms_norm(x, weight, *, eps):
    """See `op.rms_norm`; float32 or bfloat16."""
    require_dtype("rms_norm: x", x.dtype)
    rows, size = x.shape
    block = min(BLOCK, pl.cdiv(rows, TILE) * TILE)
    return pl.pallas_call(
        functools.partial(_kernel, size=size, eps=eps),
        grid=(pl.cdiv(rows, block),),
        in_specs=[pl.BlockSpec((block, size), lambda i: (i, 0)), pl.BlockSpec((1, size), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((block, size), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="rms_norm",
    )(x, weight[None])


def _kernel(x_ref, weight_ref, y_ref, *, size, eps):
    weight = weight_ref[...]

    def tile(i, _):
        at = pl.ds(pl.multiple_of(i * TILE, TILE), TILE)
        x = x_ref[at].astype(jnp.float32)
        total = jnp.sum(x * x, axis=1, keepdims=True)
        inverse = lax.rsqrt((total + size * eps) * (1.0 / size))
        y_ref[at] = ((x * inverse) * weight).astype(y_ref.dtype)

    lax.fori_loop(0, x_ref.shape[0] // TILE, tile, None)
