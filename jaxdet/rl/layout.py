"""An outside trainer's weights, laid out for jaxdet's kernels on the device."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdet.llm import LLM
from jaxdet.models.layers import DecoderLM
from jaxdet.models.registry import FAMILIES
from jaxdet.models.weights import Weights, tensor_shape
from pallas_kernels.matmul import op as matmul_op


def packed(llm: LLM, tensors: Mapping[str, Float[Array, "..."]]) -> nnx.State:
    """A trainer's tensors as the tree that `llm.update_weights` takes; cast and laid out by one program.

    Args:
        llm: whose model it is.
        tensors: on the device, by their Hugging Face names and in Hugging Face's layouts, [out, in] for matrices; any
            float dtype, each rounded once. Names that the model doesn't have are ignored.

    Returns:
        On the device: matrices in the dtype of `llm`, norms and biases in float32, to the bits that loading gives.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    step = llm.engine.step_fn
    family = FAMILIES[step.config.family]
    return _pack(family, step.config, jnp.dtype(step.dtype), step.backend, dict(tensors))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pack(family: type[DecoderLM], config, dtype, backend: str, tensors: dict[str, Array]) -> nnx.State:
    # The second position's angles are the shortest table; they are no parameters and are let go.
    model = family(_Given(_Tensors(tensors), dtype, backend, config), config, 2)
    return nnx.state(model, nnx.Param)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    tensors: dict[str, Array]

    def read(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"tensors lacks {name}; give every tensor of the model by its Hugging Face name")
        return self.tensors[name]


@dataclasses.dataclass(frozen=True)
class _Given(Weights):
    """Reads arrays that are on the device already, or traced."""

    def vector(self, *names: str, offset: float = 0.0) -> Array:
        return jnp.concatenate([self._tensor(name, jnp.float32) for name in names]) + jnp.float32(offset)

    def matrix(self, *names: str) -> Array:
        return jnp.asarray(matmul_op.pack(self._joined(*names), self.backend))

    def gated(self, gate: str, up: str) -> Array:
        return jnp.asarray(matmul_op.pack_gated(self._joined(gate), self._joined(up), self.backend))

    def _joined(self, *names: str) -> Array:
        return jnp.concatenate([self._tensor(name, self.dtype) for name in names], axis=0).T

    def _tensor(self, name: str, dtype) -> Array:
        full = self.prefix + name
        value, shape = jnp.asarray(self.source.read(full)), tensor_shape(full, self.config)
        if value.shape != shape:
            raise ValueError(f"tensors: {full} has shape {value.shape} but the model asks for {shape}")
        return value.astype(dtype)
