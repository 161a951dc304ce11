"""Matrix products with one summation order per output, whatever the number of rows."""

from typing import Literal

from jaxtyping import Array, Float, Int, Num

from pallas_kernels import registry
from pallas_kernels.arrays import HostOrDevice

Activation = Literal["silu", "gelu_tanh"]


def pack(w: Num[HostOrDevice, "K N"], backend: str | None = None) -> Num[HostOrDevice, "..."]:
    """Lays a weight matrix out the way `matmul` reads it. Done once, at load; NumPy in, NumPy out."""
    return registry.load("matmul", backend).pack(w)


def pack_gated(
    gate: Num[HostOrDevice, "K F"], up: Num[HostOrDevice, "K F"], backend: str | None = None
) -> Num[HostOrDevice, "..."]:
    """Lays the two halves of a gated MLP out the way `gated_matmul` reads them."""
    return registry.load("matmul", backend).pack_gated(gate, up)


def unpack(
    packed: Num[HostOrDevice, "..."], k: int, n: int, backend: str | None = None
) -> Num[HostOrDevice, "K N"]:
    """The inverse of `pack`, bit for bit."""
    return registry.load("matmul", backend).unpack(packed, k, n)


def take_columns(
    packed: Num[Array, "..."], ids: Int[HostOrDevice, " T"], k: int, backend: str | None = None
) -> Num[Array, "T K"]:
    """Columns `ids` of the packed [K, N] matrix, as rows: an embedding lookup that shares the LM head's weights."""
    return registry.load("matmul", backend).take_columns(packed, ids, k)


def matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "..."],
    *,
    n: int,
    bias: Float[Array, " N"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    out_dtype=None,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """y = x · w (+ bias) (+ residual), accumulated in float32 in ascending k and rounded once, at the end.

    Args:
        x: rows in float32, bfloat16 or float16; row m of the result depends on row m of `x` alone.
        packed: the [K, N] weights as `pack` laid them out, in x's dtype.
        n: N, the number of real columns.
        bias: added to the float32 sum first.
        residual: added second, before the rounding.
        out_dtype: dtype of the result; x's by default, float32 for logits.
    """
    kernel = registry.load("matmul", backend)
    return kernel.matmul(x, packed, n=n, bias=bias, residual=residual, out_dtype=out_dtype)


def gated_matmul(
    x: Float[Array, "M K"],
    packed: Float[Array, "..."],
    *,
    n: int,
    activation: Activation,
    out_dtype=None,
    backend: str | None = None,
) -> Float[Array, "M F"]:
    """act(x · w_gate) · (x · w_up), all in float32 and rounded once.

    Args:
        x: rows [M, K].
        packed: what `pack_gated` made.
        n: F, the width of each half.
        activation: "silu" or "gelu_tanh".
    """
    kernel = registry.load("matmul", backend)
    return kernel.gated_matmul(x, packed, n=n, activation=activation, out_dtype=out_dtype)
