"""Gradients of the matrix products: dx = dy · wᵀ through the forward's own kernel, dw chunk by chunk of rows."""

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.gradient import cotangent, row_total, sum_so_far, value_of
from pallas_kernels.reduce import dot_f32, pin
from pallas_kernels.rows import over_rows


def matmul(static, operands, dy):
    """Cotangents of (x, packed, bias, residual)."""
    n, _, backend = static
    kernel = registry.load("matmul", backend)
    x, packed, bias, residual = operands
    w = value_of(packed)
    k = x.shape[1]
    dx = _product(kernel, dy, kernel.unpack(w, k, n).T).astype(x.dtype)
    narrow = dy.astype(w.dtype)
    return (
        dx,
        cotangent(packed, kernel.pack(_outer(kernel.unpack(sum_so_far(packed), k, n), x, narrow))),
        None if bias is None else cotangent(bias, _column_sums(sum_so_far(bias), dy)),
        None if residual is None else dy.astype(residual.dtype),
    )


def gated_matmul(static, operands, dy):
    """Cotangents of (x, packed); gate and up are computed again."""
    n, activation, _, backend = static
    kernel = registry.load("matmul", backend)
    x, packed = operands
    k = x.shape[1]
    gate, up = kernel.unpack_gated(value_of(packed), k, n)
    act = kernel.ACTIVATIONS[activation]

    def through_activation(_, a, b, dy):
        out = jax.vjp(lambda a, b: act(a) * b, *pin(a, b))[1](pin(dy.astype(jnp.float32)))
        return None, tuple(pin(d.astype(gate.dtype)) for d in out)

    inner = (kernel.matmul(x, kernel.pack(w), n=n, out_dtype=jnp.float32) for w in (gate, up))
    _, (d_gate, d_up) = over_rows(through_activation, None, *inner, dy)
    dx = _product(kernel, d_up, up.T, residual=_product(kernel, d_gate, gate.T)).astype(x.dtype)

    sums = zip(kernel.unpack_gated(sum_so_far(packed), k, n), (d_gate, d_up), strict=True)
    return dx, cotangent(packed, kernel.pack_gated(*(_outer(sum, x, d) for sum, d in sums)))


def take_columns(static, operands, dy):
    """Cotangents of (packed, ids): dy's rows added to the columns that they came from.

    Inside a chunk every row first gets the sum of all rows with its id. So a column is written several times with the
    same value, in whatever order, where a scatter that adds would leave the order to the device.
    """
    k, backend = static
    kernel = registry.load("matmul", backend)
    packed, ids = operands

    def chunk(sum, ids, dy):
        same = (ids[:, None] == ids[None]).astype(jnp.float32)
        joined = pin(dot_f32(same, dy.astype(jnp.float32), (((1,), (0,)), ((), ()))))
        columns = pin(kernel.take_columns(sum, ids, k) + joined)
        return kernel.put_columns(sum, ids, columns), None

    total, _ = over_rows(chunk, sum_so_far(packed, lookup=True), ids, dy)
    return cotangent(packed, total, lookup=True), None


def _product(kernel, dy, w, residual=None):
    """dy · w in float32, through the forward's kernel; w is [N, K]."""
    return kernel.matmul(
        dy.astype(w.dtype), kernel.pack(w), n=w.shape[1], residual=residual, out_dtype=jnp.float32
    )


def _outer(start, x, dy):
    """start + xᵀ · dy, [K, N] in float32."""

    def add(sum, x, dy):
        return pin(sum + pin(dot_f32(x, dy, (((0,), (0,)), ((), ()))))), None

    return over_rows(add, start, x, dy)[0]


def _column_sums(start, dy):
    return over_rows(lambda sum, dy: (pin(sum + row_total(dy.astype(jnp.float32))), None), start, dy)[0]
