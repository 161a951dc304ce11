"""Hugging Face folders: config.json, one or several *.safetensors, tokenizer.json."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdet.checkpoints.base import Checkpoint, TensorInfo
from jaxdet.tokenizer import Tokenizer, read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX = "model.safetensors.index.json"


class HFCheckpoint(Checkpoint):
    """A folder as `save_pretrained` writes it.

    Raises:
        ValueError: a file is missing, damaged or cut short (named), or a dtype is not supported.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.name = folder, name or folder.resolve().name
        self.config = read_json(folder / "config.json")
        index = read_json(folder / INDEX).get("weight_map")
        if index is not None and not maps_names_to_files(index):
            raise ValueError(f"{folder / INDEX} is damaged; fetch the model again")
        files = sorted(set(index.values())) if index else sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} holds no *.safetensors; jaxdet reads safetensors only, never pickled weights"
            )
        self._place: dict[str, tuple[Path, Any]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self._open(folder / file)
        if missing := sorted(set(index or ()) - set(self.tensors)):
            raise ValueError(
                f"{folder} lacks the tensor {missing[0]!r} that {INDEX} lists; fetch the model again"
            )

    def _open(self, path: Path) -> None:
        """Checks the header and that the file is as long as it says."""
        try:
            # pread: mapped pages would count as this process's memory beside the arrays copied from them.
            file = safe_open(path, framework="np", backend="pread")
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; fetch the model again") from None
        except SafetensorError:
            raise ValueError(f"{path} is damaged or incomplete; fetch it again") from None
        for name in file.keys():  # noqa: SIM118 - a handle, not a dictionary
            entry = file.get_slice(name)
            if (kind := entry.get_dtype()) not in DTYPES:
                raise ValueError(
                    f"{path.name}: {name} has dtype {kind}, which is not supported; "
                    f"supported: {', '.join(DTYPES)}"
                )
            self.tensors[name] = TensorInfo(tuple(entry.get_shape()), DTYPES[kind])
            self._place[name] = (path, file)

    def _read(self, name: str) -> np.ndarray:
        path, file = self._place[name]
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError):
            raise ValueError(f"{path} changed while it was read; fetch it again") from None

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)


def maps_names_to_files(index: Any) -> bool:
    """Whether an index's weight_map names files of its own folder, and nothing else."""
    return isinstance(index, dict) and all(
        isinstance(file, str) and Path(file).name == file for file in index.values()
    )
