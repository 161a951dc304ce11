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


def layout_of(width: int):
    """How a row of `width` columns, a multiple of THREADS, lies on a warpgroup."""
    vector = next(v for v in (8, 4, 2, 1) if width % (THREADS * v) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=vector)


def normalised(x, weight, size: int, eps: float):
    """A row of `size` columns, filled up with zeros, inside a kernel: x in `layout_of` and weight alike, in float32."""
    value = x.astype(jnp.float32)
    total = jnp.sum(value * value)
    inverse = lax.rsqrt((total + size * eps) * (1.0 / size))
    return ((value * inverse) * weight).astype(x.dtype)


@functools.cache
def _kernel(shape, size, together, dtype, eps, _interpreting):
    layout = layout_of(shape[1])

    def body(x_g, weight_g, y_g):
        rows = [lax.axis_index("cta") * together + i for i in range(together)]
        xs = [plgpu.load(x_g.at[row], layout=layout) for row in rows]
        weight = plgpu.load(weight_g, layout=layout)  # in flight while the rows are summed
        for row, x in zip(rows, xs, strict=True):
            y_g[row] = normalised(x, weight, size, eps)

    return plgpu.kernel(
        body,
        kernel_name="rms_norm",
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(shape[0] // together,),
        grid_names=("cta",),
    )
