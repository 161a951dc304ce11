"""RMSNorm's gradient on Hopper: a CTA of 128 threads walks over ROWS rows, each in Mosaic's trees for its length.

With i = 1/√((Σx² + H·eps) / H) as in the forward, n = x · i and g = dy · weight, all in float32:
dx = (g − n · Σ(g · n) / H) · i, rounded once. The weight's gradient adds n · dy: the ROWS rows of a CTA ascending, the
CTAs of a chunk of GRADIENT_ROWS in a tree, chunk after chunk.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, plgpu
from pallas_kernels.gradient import add_chunks
from pallas_kernels.numerics import GRADIENT_ROWS
from pallas_kernels.rms_norm.mosaic_gpu_sm90 import THREADS

ROWS = 16


def rms_norm(x, weight, total, dy, eps, *, each: int = 1):
    """(dx in x's dtype, total + the weight's gradient); `each` rows belong together as one of the sum's.

    A row without a gradient adds nothing, be x NaN.
    """
    rows, size = x.shape
    chunk = GRADIENT_ROWS * each
    pad = (0, -rows % chunk), (0, -size % THREADS)
    if pad != ((0, 0), (0, 0)):
        x, dy, weight = jnp.pad(x, pad), jnp.pad(dy, pad), jnp.pad(weight, pad[1])
    dx, parts = _kernel(x.shape, size, x.dtype, float(eps), interpreting())(x, weight, dy)
    total = add_chunks(total, parts[:, :size].reshape(-1, chunk // ROWS, size))
    return (dx if dx.shape == (rows, size) else dx[:rows, :size]), total


@functools.cache
def _kernel(shape, size, dtype, eps, _interpreting):
    rows, columns = shape
    vector = next(v for v in (8, 4, 2, 1) if columns % (THREADS * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((columns,), vec_size=vector)

    def body(x_g, weight_g, dy_g, dx_g, parts_g):
        cta = lax.axis_index("cta")
        weight = plgpu.load(weight_g, layout=layout)

        def each_row(i, part):
            row = cta * ROWS + i
            x, dy = (plgpu.load(ref.at[row], layout=layout).astype(jnp.float32) for ref in (x_g, dy_g))
            count = jnp.sum(jnp.where(dy != 0, 1.0, 0.0))
            live = plgpu.layout_cast(lax.broadcast_in_dim(count, (columns,), []), layout) > 0
            inverse = lax.rsqrt((jnp.sum(x * x) + size * eps) * (1.0 / size))
            normal, g = x * inverse, dy * weight
            mean = jnp.sum(g * normal) * (1.0 / size)
            dx_g[row] = jnp.where(live, (g - normal * mean) * inverse, 0.0).astype(dtype)
            return part + jnp.where(live, normal * dy, 0.0)

        zeros = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), layout)
        parts_g[cta] = lax.fori_loop(0, ROWS, each_row, zeros)

    return plgpu.kernel(
        body,
        kernel_name="rms_norm_gradient",
        out_type=(
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct((rows // ROWS, columns), jnp.float32),
        ),
        grid=(rows // ROWS,),
        grid_names=("cta",),
    )
