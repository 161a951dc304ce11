"""RMSNorm on Hopper: one row a CTA of 128 threads, so that a row's program is the same whatever the batch.

Σx² in Mosaic's tree for a row of this length, then x · 1/√((Σx² + H·eps) / H) · weight in float32,
rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, plgpu, require_hopper

THREADS = 128


def rms_norm(x, weight, *, eps):
    """See `op.rms_norm`; bfloat16 or float16."""
    require_hopper("rms_norm")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"rms_norm: x is {x.dtype}; mosaic_gpu takes bfloat16 or float16; use backend='xla'")
    size = x.shape[1]
    pad = -size % THREADS
    if pad:
        x, weight = jnp.pad(x, ((0, 0), (0, pad))), jnp.pad(weight, (0, pad))
    y = _kernel(x.shape, size, x.dtype, float(eps), interpreting())(x, weight)
    return y[:, :size] if pad else y


@functools.cache
def _kernel(shape, size, dtype, eps, _interpreting):
    vector = next(v for v in (8, 4, 2, 1) if shape[1] % (THREADS * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((shape[1],), vec_size=vector)

    def body(x_g, weight_g, y_g):
        row = lax.axis_index("row")
        x = plgpu.load(x_g.at[row], layout=layout).astype(jnp.float32)
        weight = plgpu.load(weight_g, layout=layout)  # in flight while the row is summed
        total = jnp.sum(x * x)
        inverse = lax.rsqrt((total + size * eps) * (1.0 / size))
        y_g[row] = ((x * inverse) * weight).astype(dtype)

    return plgpu.kernel(
        body,
        kernel_name="rms_norm",
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[0],),
        grid_names=("row",),
    )
