"""The matmul's gradient in XLA: dx = dy · wᵀ through the forward's own kernel, dw chunk by chunk of rows."""

import jax
import jax.numpy as jnp

from pallas_kernels.gradient import live_rows
from pallas_kernels.reduce import dot_f32, pin
from pallas_kernels.rows import over_rows


def matmul(kernel, x, packed, total, dy, n):
    """(dx in x's dtype, total + xᵀ · dy as packed), with dy [M, N] in the weights' dtype."""
    k = x.shape[1]
    dx = _product(kernel, dy, kernel.unpack(packed, k, n).T).astype(x.dtype)
    return dx, kernel.pack(_outer(kernel.unpack(total, k, n), x, dy))


def gated_forward(kernel, x, packed, **options):
    """(act(x · w_gate) · (x · w_up), nothing else)."""
    return kernel.gated_matmul(x, packed, **options), None


def gated_matmul(kernel, x, packed, total, _saved, dy, n, activation):
    """The same for act(x · w_gate) · (x · w_up); gate and up are computed again."""
    k = x.shape[1]
    gate, up = kernel.unpack_gated(packed, k, n)
    act = kernel.ACTIVATIONS[activation]

    def through_activation(_, a, b, dy):
        out = jax.vjp(lambda a, b: act(a) * b, *pin(a, b))[1](pin(dy.astype(jnp.float32)))
        return None, tuple(pin(d.astype(gate.dtype)) for d in out)

    inner = (kernel.matmul(x, kernel.pack(w), n=n, out_dtype=jnp.float32) for w in (gate, up))
    _, (d_gate, d_up) = over_rows(through_activation, None, *inner, dy)
    dx = _product(kernel, d_up, up.T, residual=_product(kernel, d_gate, gate.T)).astype(x.dtype)

    sums = zip(kernel.unpack_gated(total, k, n), (d_gate, d_up), strict=True)
    return dx, kernel.pack_gated(*(_outer(sum, x, d) for sum, d in sums))


def _product(kernel, dy, w, residual=None):
    """dy · w in float32, through the forward's kernel; w is [N, K]."""
    return kernel.matmul(dy, kernel.pack(w), n=w.shape[1], residual=residual, out_dtype=jnp.float32)


def _outer(start, x, dy):
    """start + xᵀ · dy, [K, N] in float32; a row whose dy is all zero adds nothing, even if its x is NaN."""

    def add(sum, x, dy):
        x = jnp.where(live_rows(dy), x, 0)
        return pin(sum + pin(dot_f32(x, dy, (((0,), (0,)), ((), ()))))), None

    return over_rows(add, start, x, dy)[0]
