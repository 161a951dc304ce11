"""The gated product's activation backwards, on Hopper: one pass over gate, up and the result's gradient.

In float32: d_gate = dy · up · act′(gate) and d_up = dy · act(gate), each rounded once; 0 where dy is 0, be the others
NaN, so that rows without a gradient stay such. Every value depends on three others alone, and every sum of a product is
one FMA, so that no bit depends on where a row is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import fused_multiply_add, interpreting, pl, plgpu, store_any_width
from pallas_kernels.matmul.mosaic_gpu_sm90 import GATE_GROUP

PIECES = 64
"""Pieces of GATE_GROUP columns of a row that a CTA takes."""
# A warp has eight pieces, 16 bytes a lane.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((32, GATE_GROUP), (8, GATE_GROUP), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def before_activation(inner, dy, activation: str):
    """Gradient of act(gate) · up by both, in the dtype and layout of `inner`.

    Args:
        inner: [M, packed columns] in bfloat16 or float16, M a multiple of 64; gate and up as `pack_gated` has them.
        dy: [M, packed columns / 2], the result's gradient in any float dtype.
        activation: "silu" or "gelu_tanh".
    """
    both, one = inner.reshape(-1, 2, GATE_GROUP), dy.reshape(-1, GATE_GROUP)
    return _kernel(len(one), inner.dtype, activation, interpreting())(both, one).reshape(inner.shape)


def _silu(x):
    """(x · σ, its derivative σ · (1 + x · (1 − σ))) with σ = 1 / (1 + exp(−x))."""
    sigma = 1.0 / (1.0 + jnp.exp(-x))
    return x * sigma, sigma * _add_one(x, 1.0 - sigma)


def _gelu_tanh(x):
    """(x · σ, its derivative σ · (1 + x · t′ · (1 − σ))) with σ = 1 / (1 + exp(−t)), t = √(8/π) (x + 0.044715 x³)."""
    scaled = 1.5957691216057308 * x
    sigma = 1.0 / (1.0 + jnp.exp(-scaled * _add_one(0.044715 * x, x)))
    return x * sigma, sigma * _add_one(scaled * _add_one(0.134145 * x, x), 1.0 - sigma)


def _add_one(a, b):
    """a · b + 1"""
    return fused_multiply_add(a, b, plgpu.layout_cast(jnp.ones(a.shape, a.dtype), LAYOUT), LAYOUT)


WITH_SLOPE = {"silu": _silu, "gelu_tanh": _gelu_tanh}


@functools.cache
def _kernel(pieces, dtype, activation, _interpreting):
    def body(inner_g, dy_g, d_inner_g):
        mine = pl.ds(lax.axis_index("cta") * PIECES, PIECES)
        gate, up, dy = (
            plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)
            for ref in (inner_g.at[mine, 0], inner_g.at[mine, 1], dy_g.at[mine])
        )
        value, slope = WITH_SLOPE[activation](gate)
        for half, gradient in enumerate((dy * up * slope, dy * value)):
            store_any_width(jnp.where(dy == 0.0, 0.0, gradient).astype(dtype), d_inner_g.at[mine, half])

    return plgpu.kernel(
        body,
        kernel_name=f"before_{activation}",
        out_type=jax.ShapeDtypeStruct((pieces, 2, GATE_GROUP), dtype),
        grid=(pieces // PIECES,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
