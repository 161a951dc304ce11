"""Reads a checkpoint's tensors, one at a time, into the dtype and layout the layers use."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxdet.cast import CHECKED_AT_ONCE, cast
from jaxdet.models.config import ModelConfig
from pallas_kernels.matmul import op as matmul_op


class TensorSource(Protocol):
    """The part of a checkpoint that a model needs; tensors carry Hugging Face names and layouts."""

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint seen from one module: names are relative to `prefix`."""

    source: TensorSource
    dtype: jnp.dtype
    backend: str
    config: ModelConfig
    prefix: str = ""

    def __truediv__(self, name: str) -> "Weights":
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def vector(self, *names: str, offset: float = 0.0) -> jax.Array:
        """One-dimensional tensors, joined, in float32; `offset` is added (Gemma's norms store w − 1)."""
        return jnp.asarray(np.concatenate([self._vector(name, offset) for name in names]))

    def matrix(self, *names: str) -> jax.Array:
        """[out, in] tensors, stacked along out, packed for `matmul`."""
        return jnp.asarray(matmul_op.pack(self._matrix(*names), self.backend))

    def gated(self, gate: str, up: str) -> jax.Array:
        """A gate and an up projection, packed for `gated_matmul`."""
        return jnp.asarray(matmul_op.pack_gated(self._matrix(gate), self._matrix(up), self.backend))

    def _vector(self, name: str, offset: float) -> np.ndarray:
        value = self._read(name)
        if value.dtype != np.float64:  # which is rounded once, offset included: see `origins`
            value = value.astype(np.float32, copy=False)
        return cast(self.prefix + name, value + offset, np.float32)

    def _matrix(self, *names: str) -> np.ndarray:
        parts = [self._cast(name, self.dtype) for name in names]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)).T

    def _cast(self, name: str, dtype: np.typing.DTypeLike) -> np.ndarray:
        return cast(self.prefix + name, self._read(name), dtype)

    def _read(self, name: str) -> np.ndarray:
        full = self.prefix + name
        value, shape = self.source.read(full), tensor_shape(full, self.config)
        if value.shape != shape:
            raise ValueError(
                f"tensor {full} has shape {value.shape} but the config asks for {shape}; fetch the model again"
            )
        flat = value.reshape(-1)
        for start in range(0, flat.size, CHECKED_AT_ONCE):
            if not np.isfinite(flat[start : start + CHECKED_AT_ONCE]).all():
                raise ValueError(f"tensor {full} holds NaN or inf; the checkpoint is damaged, fetch it again")
        return value


def tensor_shape(name: str, config: ModelConfig) -> tuple[int, ...]:
    """The shape that a tensor must have, by the last parts of its Hugging Face name."""
    module, kind = name.split(".")[-2:]
    c = config
    q, kv = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = {
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "lm_head": (c.vocab_size, c.hidden_size),
        "q_proj": (q, c.hidden_size),
        "k_proj": (kv, c.hidden_size),
        "v_proj": (kv, c.hidden_size),
        "o_proj": (c.hidden_size, q),
        "gate_proj": (c.intermediate_size, c.hidden_size),
        "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
        "q_norm": (c.head_dim,),
        "k_norm": (c.head_dim,),
    }
    shape = matrices.get(module, (c.hidden_size,))
    return shape[:1] if kind == "bias" else shape
