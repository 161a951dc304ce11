"""Gradients whose bits depend on the examples and their order, not on how they are cut into micro-batches.

What a weight's gradient sums over is rows. Rows are taken in chunks of GRADIENT_ROWS; each chunk's part is computed in
one fixed shape and added to the sum, chunk after chunk. A micro-batch begins with the sum that the one before it left
(`Trained.gradient`), so that the additions are the same ones wherever the cut is, if every example begins at a multiple
of GRADIENT_ROWS; rows without a gradient add exact zeros.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.compat import interpreting
from pallas_kernels.numerics import GRADIENT_ROWS
from pallas_kernels.reduce import pin

UNROLL = 16
"""Chunks that one kernel adds: each takes less time than a launch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trained:
    """A weight whose gradient is being summed; takes the weight's place in a model and in every op.

    Differentiate with respect to `gradient`: an op's cotangent for it is `gradient` plus the op's own, added in float32
    chunk by chunk. `value` gets none.
    """

    value: Float[Array, "..."]
    """The weight, in the dtype and layout that the op takes."""
    gradient: Float[Array, "..."]
    """float32, in the same layout: the sum so far."""
    lookup: Float[Array, "..."] | None = None
    """For an LM head that is the embedding too: the embedding's sum so far, apart from the head's. Two ops that summed
    from one start would count it twice."""

    def __getitem__(self, key: Any) -> "Trained":
        """Itself for `...`, the one index that modules read a parameter with."""
        if key is not Ellipsis:
            raise IndexError(f"a weight in training has no part {key!r}; take its value's")
        return self


Weight = Array | Trained
"""What an op takes as a weight."""


@overload
def value_of(weight: Weight) -> Array: ...
@overload
def value_of(weight: None) -> None: ...
def value_of(weight: Weight | None) -> Array | None:
    """The array that the forward pass reads."""
    return weight.value if isinstance(weight, Trained) else weight


def sum_so_far(weight: Weight, *, lookup: bool = False) -> Float[Array, "..."]:
    """Where an op begins to add: at the sum that `weight` brings, or at zero for a bare array.

    Args:
        lookup: for the embedding's gradient, which has a sum of its own in a matrix that is the LM head too.
    """
    if not isinstance(weight, Trained):
        return jnp.zeros(weight.shape, jnp.float32)
    return weight.lookup if lookup and weight.lookup is not None else weight.gradient


def cotangent(weight: Weight, total: Float[Array, "..."], *, lookup: bool = False) -> Weight:
    """What an op's backward returns for `weight`; rounded to its dtype if it is a bare array."""
    if not isinstance(weight, Trained):
        return total.astype(weight.dtype)
    # None is a cotangent of zero.
    if lookup and weight.lookup is not None:
        return Trained(None, None, total)  # type: ignore[arg-type]
    return Trained(None, total)  # type: ignore[arg-type]


def with_gradient(
    backward: Callable[..., tuple], saving: Callable[..., tuple[Any, Any]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives `f(static, *operands)` the cotangents `backward(static, operands, cotangent of the result)`.

    `f` stays what it is: the forward pass under differentiation is `f` itself, or `saving`.

    Args:
        saving: (static, *operands) -> (f's result to the last bit, what backward gets after the operands).
    """

    def decorate(f):
        def differentiable(optimize_remat):
            g = jax.custom_vjp(f, nondiff_argnums=(0,))

            def forward(static, *operands):
                if saving is None:
                    return g(static, *operands), (operands,)
                result, saved = saving(static, *operands)
                return result, (operands, saved)

            g.defvjp(
                forward,
                lambda static, kept, dy: backward(static, *kept, dy),
                optimize_remat=optimize_remat,
            )
            return g

        plain = differentiable(False)
        if saving is None:
            return plain
        # Under `jax.checkpoint` the first pass is f: what `saving` keeps would be thrown away.
        optimized = differentiable(True)
        # Interpreted kernels have effects, which that can't be done with.
        return lambda static, *operands: (plain if interpreting() else optimized)(static, *operands)

    return decorate


def add_rows(start: Float[Array, " N"], x: Float[Array, "rows ... N"]) -> Float[Array, " N"]:
    """start + all rows of x, in chunks of GRADIENT_ROWS; what stands between rows and columns belongs to its row."""
    rows, columns = x.shape[0], x.shape[-1]
    x = jnp.pad(x, ((0, -rows % GRADIENT_ROWS), *((0, 0),) * (x.ndim - 1)))
    return add_chunks(start, x.reshape(-1, GRADIENT_ROWS * math.prod(x.shape[1:-1]), columns))


def add_chunks(start: Float[Array, " N"], x: Float[Array, "chunks parts N"]) -> Float[Array, " N"]:
    """start + all parts of x: a chunk's in a tree, then chunk after chunk.

    In the tree, filled up with zeros to a power of two, the upper half of the parts is added to the lower half until
    one is left.
    """
    parts = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, (1 << (parts - 1).bit_length()) - parts), (0, 0)))
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = pin(x[:, :half] + x[:, half:])
    return lax.scan(lambda sum, part: (sum + part, None), start, x[:, 0], unroll=UNROLL)[0]


def live_rows(dy: Float[Array, "rows N"]) -> Bool[Array, "rows 1"]:
    """Which rows have a gradient at all: the others add nothing, be their activations NaN."""
    return jnp.any(dy != 0, axis=-1, keepdims=True)
