"""Gradients of the matrix products; those of x and of the weights are in `backward_xla` and `backward_sm90`."""

import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.gradient import add_rows, cotangent, sum_so_far, value_of
from pallas_kernels.reduce import dot_f32, pin
from pallas_kernels.rows import over_rows


def matmul(static, operands, dy):
    """Cotangents of (x, packed, bias, residual)."""
    n, _, backend = static
    x, packed, bias, residual = operands
    w = value_of(packed)
    dx, total = registry.load_backward("matmul", backend).matmul(
        registry.load("matmul", backend), x, w, sum_so_far(packed), dy.astype(w.dtype), n
    )
    return (
        dx,
        cotangent(packed, total),
        None if bias is None else cotangent(bias, add_rows(sum_so_far(bias), dy.astype(jnp.float32))),
        None if residual is None else dy.astype(residual.dtype),
    )


def gated_forward(static, x, packed):
    """(the gated product, what its gradient wants of it)."""
    n, activation, out_dtype, backend = static
    kernel, options = registry.load("matmul", backend), {"n": n, "activation": activation}
    return registry.load_backward("matmul", backend).gated_forward(
        kernel, x, value_of(packed), out_dtype=out_dtype, **options
    )


def gated_matmul(static, operands, saved, dy):
    """Cotangents of (x, packed)."""
    n, activation, _, backend = static
    x, packed = operands
    dx, total = registry.load_backward("matmul", backend).gated_matmul(
        registry.load("matmul", backend), x, value_of(packed), sum_so_far(packed), saved, dy, n, activation
    )
    return dx, cotangent(packed, total)


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
