"""Reads a checkpoint's tensors, one at a time, into the dtype and layout the layers use."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

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
    prefix: str = ""

    def __truediv__(self, name: str) -> "Weights":
        return dataclasses.replace(self, prefix=f"{self.prefix}{name}.")

    def vector(self, *names: str, offset: float = 0.0) -> jax.Array:
        """One-dimensional tensors, joined, in float32; `offset` is added (Gemma's norms store w − 1)."""
        parts = [self._read(name).astype(np.float32) for name in names]
        return jnp.asarray(np.concatenate(parts) + np.float32(offset))

    def matrix(self, *names: str) -> jax.Array:
        """[out, in] tensors, stacked along out, packed for `matmul`."""
        return jnp.asarray(matmul_op.pack(self._matrix(*names), self.backend))

    def gated(self, gate: str, up: str) -> jax.Array:
        """A gate and an up projection, packed for `gated_matmul`."""
        return jnp.asarray(matmul_op.pack_gated(self._matrix(gate), self._matrix(up), self.backend))

    def _matrix(self, *names: str) -> np.ndarray:
        return np.concatenate([self._cast(self._read(name)) for name in names], axis=0).T

    def _cast(self, value: np.ndarray) -> np.ndarray:
        return value.astype(ml_dtypes.bfloat16 if self.dtype == jnp.bfloat16 else self.dtype)

    def _read(self, name: str) -> np.ndarray:
        full = self.prefix + name
        value = self.source.read(full)
        if not np.isfinite(value).all():
            raise ValueError(f"tensor {full} holds NaN or inf; the checkpoint is damaged, fetch it again")
        return value
