"""Matrix products with one summation order per output, whatever the number of rows."""

import functools
from typing import Literal

import jax
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice
from pallas_kernels.backend import resolve
from pallas_kernels.gradient import Trained, value_of, with_gradient
from pallas_kernels.matmul import backward, mosaic_gpu_sm90, tuning_sm90
from pallas_kernels.rms_norm.op import rms_norm

Activation = Literal["silu", "gelu_tanh"]
"""What a gated product's gate goes through; "gelu_tanh" is GELU's tanh approximation."""
Norm = tuple[Float[Array, " K"] | Trained, float]
"""RMSNorm's weights, in float32, and its eps."""


def pack(w: Num[HostOrDevice, "K N"], backend: str | None = None) -> Num[HostOrDevice, "..."]:
    """Lays a weight matrix out the way `matmul` reads it. Done once, at load; NumPy in, NumPy out.

    Args:
        w: the weights, [inputs, outputs], in the dtype of the products.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Returns:
        The same values in the backend's own layout, padded with zeros; only ops and `unpack` know it.
    """
    return registry.load("matmul", backend).pack(w)


def pack_gated(
    gate: Num[HostOrDevice, "K F"], up: Num[HostOrDevice, "K F"], backend: str | None = None
) -> Num[HostOrDevice, "..."]:
    """Lays the two halves of a gated MLP out the way `gated_matmul` reads them; see `pack`."""
    return registry.load("matmul", backend).pack_gated(gate, up)


def unpack(
    packed: Num[HostOrDevice, "..."], k: int, n: int, backend: str | None = None
) -> Num[HostOrDevice, "K N"]:
    """The inverse of `pack`, bit for bit.

    Args:
        packed: what `pack` made.
        k, n: the shape of the matrix.
        backend: the one that it was packed for.
    """
    return registry.load("matmul", backend).unpack(packed, k, n)


def unpack_gated(
    packed: Num[HostOrDevice, "..."], k: int, n: int, backend: str | None = None
) -> tuple[Num[HostOrDevice, "K F"], Num[HostOrDevice, "K F"]]:
    """The inverse of `pack_gated`: (gate, up), each [k, n]; see `unpack`."""
    return registry.load("matmul", backend).unpack_gated(packed, k, n)


def whole_rows(rows: int, backend: str | None = None) -> int:
    """How many rows a product had better have that needs `rows`: fewer would be copied to be filled up to whole tiles.

    Args:
        rows: at least 1.
        backend: "mosaic_gpu" has such tiles; elsewhere it is `rows`.
    """
    return tuning_sm90.whole_rows(rows) if resolve(backend) == "mosaic_gpu" else rows


def take_columns(
    packed: Num[Array, "..."] | Trained, ids: Int[HostOrDevice, " T"], k: int, backend: str | None = None
) -> Num[Array, "T K"]:
    """Columns `ids` of the packed [K, N] matrix, as rows: an embedding lookup that shares the LM head's weights.

    Args:
        packed: what `pack` made.
        ids: columns, each in [0, N); nothing checks that.
        k: K, the length of a column.
        backend: the one that it was packed for.
    """
    return _take_columns((k, backend), packed, ids)


def matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "..."] | Trained,
    *,
    n: int,
    bias: Float[Array, " N"] | Trained | None = None,
    residual: Float[Array, "M N"] | None = None,
    norm: Norm | None = None,
    out_dtype=None,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """y = x · w (+ bias) (+ residual), accumulated in float32 in ascending k and rounded once, at the end.

    Its gradient by w adds rows in ascending order to the sum that `Trained` brings, in float32: wherever a batch is cut
    at a multiple of GRADIENT_ROWS rows, the bits are the same. With "mosaic_gpu" products join the sum one wgmma step
    of 16 rows after the other; elsewhere GRADIENT_ROWS are summed apart, and then added. A row whose dy is all zero
    adds nothing, even if its x is NaN; with "mosaic_gpu" GRADIENT_ROWS rows, from a multiple of that on, whose dy is
    all zero. The gradient by x is dy · wᵀ, a sum over ascending columns.

    Args:
        x: rows in float32, bfloat16 or float16; row m of the result depends on row m of `x` alone.
        packed: the [K, N] weights as `pack` laid them out, in x's dtype.
        n: N, the number of real columns.
        bias: added to the float32 sum first.
        residual: added second, before the rounding.
        norm: x goes through `rms_norm` first, with these weights and eps. The bits are those of the two ops; up to
            4 rows of at most 8192 columns, a multiple of 1024, are one launch with "mosaic_gpu".
        out_dtype: dtype of the result; x's by default, float32 for logits.
        backend: the one that `packed` was packed for: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    static = n, out_dtype, backend
    return _after_norm(norm, _launch, _matmul, static, x, packed, bias, residual)


def gated_matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "..."] | Trained,
    *,
    n: int,
    activation: Activation,
    norm: Norm | None = None,
    out_dtype=None,
    backend: str | None = None,
) -> Float[Array, "M F"]:
    """act(x · w_gate) · (x · w_up), all in float32 and rounded once.

    Its gradient is `matmul`'s, of both halves, which are computed again; with "mosaic_gpu" they are kept, rounded to
    x's dtype. That by x adds gate's columns and then up's; with "mosaic_gpu" 32 of gate, 32 of up, and so on.

    Args:
        x: rows [M, K].
        packed: what `pack_gated` made.
        n: F, the width of each half.
        activation: "silu" or "gelu_tanh".
        norm: as in `matmul`.
        out_dtype: dtype of the result; x's by default.
        backend: the one that `packed` was packed for: "xla", "mosaic_gpu" or "mosaic_tpu"; None is "xla".

    Raises:
        ValueError: the backend is unknown, or doesn't take the dtype or this device (named, with the remedy).
        NotImplementedError: the backend has no such kernel.
    """
    return _after_norm(norm, _gated_launch, _gated_matmul, (n, activation, out_dtype, backend), x, packed)


def _after_norm(norm: Norm | None, launch, op, static, x, *operands):
    """`op` of x or, with a `norm`, of the normalised x; one `launch` where the kernel does both."""
    if norm is None:
        return op(static, x, *operands)
    weight, eps = norm
    both = launch, op, static, eps
    if resolve(static[-1]) == "mosaic_gpu" and mosaic_gpu_sm90.takes_norm(*x.shape):
        return _normed(both, x, weight, *operands)
    return _two_ops(both, x, weight, *operands)


def _two_ops(both, x, weight, *operands):
    _, op, static, eps = both
    return op(static, rms_norm(x, weight, eps=eps, backend=static[-1]), *operands)


def _normed_backward(both, operands, dy):
    return jax.vjp(functools.partial(_two_ops, both), *operands)[1](dy)


@with_gradient(_normed_backward)
def _normed(both, x, weight, *operands):
    """`_two_ops` in one launch, to its bits; its gradient is theirs."""
    launch, _, static, eps = both
    return launch(static, x, *operands, norm=(value_of(weight), eps))


def _launch(static, x, packed, bias, residual, **norm):
    n, out_dtype, backend = static
    return registry.load("matmul", backend).matmul(
        x, value_of(packed), n=n, bias=value_of(bias), residual=residual, out_dtype=out_dtype, **norm
    )


def _gated_launch(static, x, packed, **norm):
    n, activation, out_dtype, backend = static
    kernel = registry.load("matmul", backend)
    return kernel.gated_matmul(x, value_of(packed), n=n, activation=activation, out_dtype=out_dtype, **norm)


_matmul = with_gradient(backward.matmul)(_launch)
_gated_matmul = with_gradient(backward.gated_matmul, saving=backward.gated_forward)(_gated_launch)


@with_gradient(backward.take_columns)
def _take_columns(static, packed, ids):
    k, backend = static
    return registry.load("matmul", backend).take_columns(value_of(packed), ids, k)
