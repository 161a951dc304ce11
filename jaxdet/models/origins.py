"""From a model's parameters back to a checkpoint's tensors: a family's own constructor says what came from where."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxdet.models.config import ModelConfig
from jaxdet.models.layers import DecoderLM
from jaxdet.models.weights import Weights, tensor_shape
from pallas_kernels.matmul import op as matmul_op


@dataclasses.dataclass(frozen=True)
class Origin:
    """The tensors that one parameter was made of, and how."""

    kind: Literal["vector", "matrix", "gated"]
    """The method of `Weights` that made it."""
    names: tuple[str, ...]
    """In Hugging Face's names."""
    offset: float = 0.0
    """Added when it was read."""

    def tensors(
        self, value: Float[Array, "..."], config: ModelConfig, backend: str
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """The parameter taken apart: each tensor in Hugging Face's layout, so that loading gives the same bits.

        Matrices keep the parameter's dtype. Vectors are float32; where an offset can't be taken off to float32 they are
        float64, in which it can (but for values below 2**-29, from an offset of 1).

        Args:
            value: the parameter, packed for `backend`.
        """
        shapes = [tensor_shape(name, config) for name in self.names]
        host = np.asarray(value)
        if self.kind == "gated":
            width, k = shapes[0]
            parts = [np.asarray(half).T for half in matmul_op.unpack_gated(host, k, width, backend)]
        else:
            if self.kind == "matrix":
                width = sum(shape[0] for shape in shapes)
                host = np.asarray(matmul_op.unpack(host, shapes[0][1], width, backend)).T
            else:
                host = _without(host, np.float32(self.offset))
            parts = np.split(host, np.cumsum([shape[0] for shape in shapes])[:-1])
        return dict(zip(self.names, parts, strict=True))


def origins(family: type[DecoderLM], config: ModelConfig, dtype: jnp.dtype, backend: str) -> nnx.State:
    """An `Origin` in the place of every parameter of a model.

    Args:
        family, config: the model's class and shape.
        dtype, backend: what the parameters are packed for.
    """
    # The second position's angles are the shortest table; they are no parameters and are let go.
    model = family(_Noted(_NoSource(), dtype, backend, config), config, 2)
    return nnx.state(model, nnx.Param)


@dataclasses.dataclass(frozen=True)
class _Noted(Weights):
    """Notes the tensors that a family asks for instead of reading them."""

    def vector(self, *names: str, offset: float = 0.0) -> Any:
        return Origin("vector", self._full(names), offset)

    def matrix(self, *names: str) -> Any:
        return Origin("matrix", self._full(names))

    def gated(self, gate: str, up: str) -> Any:
        return Origin("gated", self._full((gate, up)))

    def _full(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in names)


class _NoSource:
    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} is noted, not read")


def _without(value: np.ndarray, offset: np.float32) -> np.ndarray:
    less = value - offset
    return less if np.array_equal(less + offset, value) else value.astype(np.float64) - offset
