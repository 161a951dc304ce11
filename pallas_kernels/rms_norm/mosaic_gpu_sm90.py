"""RMSNorm on Hopper: 128 threads sum a row, so that a row's program is the same whatever the batch.

Σx² in Mosaic's tree for a row of this length, then x · 1/√((Σx² + H·eps) / H) · weight in float32,
rounded once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, plgpu, require_hopper

THREADS = 128
PAIRED = range(513, 1025)
"""Row counts at which a CTA takes two rows, both in flight: 5.0 µs instead of 5.4 at 1024. Fewer would leave SMs idle;
of more, one row a CTA is faster."""


def rms_norm(x, weight, *, eps):
    """See `op.rms_norm`; bfloat16 or float16."""
    require_hopper("rms_norm")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"rms_norm: x is {x.dtype}; mosaic_gpu takes bfloat16 or float16; use backend='xla'")
    size = x.shape[1]
    pad = -size % THREADS
    if pad:
        x, weight = jnp.pad(x, ((0, 0), (0, pad))), jnp.pad(weight, (0, pad))
    together = 2 if len(x) in PAIRED and len(x) % 2 == 0 else 1
    y = _kernel(x.shape, size, together, x.dtype, float(eps), interpreting())(x, weight)
    return y[:, :size] if pad else y


@functools.cache
def _kernel(shape, size, together, dtype, eps, _interpreting):
    vector = next(v for v in (8, 4, 2, 1) if shape[1] % (THREADS * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((shape[1],), vec_size=vector)

    def body(x_g, weight_g, y_g):
        rows = [lax.axis_index("cta") * together + i for i in range(together)]
        xs = [plgpu.load(x_g.at[row], layout=layout) for row in rows]
        weight = plgpu.load(weight_g, layout=layout)  # in flight while the rows are summed
        for row, x in zip(rows, xs, strict=True):
            x = x.astype(jnp.float32)
            total = jnp.sum(x * x)
            inverse = lax.rsqrt((total + size * eps) * (1.0 / size))
            y_g[row] = ((x * inverse) * weight).astype(dtype)

    return plgpu.kernel(
        body,
        kernel_name="rms_norm",
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[0] // together,),
        grid_names=("cta",),
    )
