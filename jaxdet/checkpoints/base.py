"""What every checkpoint format offers: a config, named tensors read one at a time, a tokenizer."""

import abc
import dataclasses
import hashlib
from typing import Any

import numpy as np

from jaxdet.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape (Hugging Face layout: [out, in]) and dtype of a tensor, known without reading it."""

    shape: tuple[int, ...]
    """Elements along each axis."""
    dtype: np.dtype
    """As it is stored, or as `read` gives it where it is stored quantised."""


class Checkpoint(abc.ABC):
    """A model on disk. Tensors carry Hugging Face names and layouts whatever the format."""

    name: str
    """What the model is called in messages and answers: its folder's, file's or hub's name."""
    config: dict[str, Any]
    """The model's config.json."""
    tensors: dict[str, TensorInfo]
    """What `read` takes."""

    def read(self, name: str) -> np.ndarray:
        """One tensor; nothing else is kept in memory.

        Args:
            name: a key of `tensors`.

        Raises:
            ValueError: the checkpoint has no such tensor.
        """
        if name not in self.tensors:
            raise ValueError(
                f"{self.name} has no tensor {name!r}; the checkpoint is incomplete, fetch it again"
            )
        return self._read(name)

    @abc.abstractmethod
    def _read(self, name: str) -> np.ndarray: ...

    @abc.abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ValueError: it is missing, damaged or of a kind that isn't supported.
        """

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            value = self.read(name)
            total.update(f"{name}/{value.dtype}/{value.shape}/".encode())
            total.update(np.ascontiguousarray(value).view(np.uint8).data)
        return total.hexdigest()
