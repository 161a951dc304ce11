"""Hugging Face folders: config.json, one or several *.safetensors, tokenizer.json."""

import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

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
        ValueError: a file is missing, damaged or cut short (named).
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.name = folder, name or folder.name
        self.config = read_json(folder / "config.json")
        index = read_json(folder / INDEX).get("weight_map")
        files = sorted(set(index.values())) if index else sorted(p.name for p in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"{folder} holds no *.safetensors; jaxdet reads safetensors only, never pickled weights"
            )
        self._place: dict[str, tuple[Path, int]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self._read_header(folder / file)
        if missing := sorted(set(index or ()) - set(self.tensors)):
            raise ValueError(
                f"{folder} lacks the tensor {missing[0]!r} that {INDEX} lists; fetch the model again"
            )

    def _read_header(self, path: Path) -> None:
        damaged = f"{path} is damaged or incomplete; fetch it again"
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    raise ValueError(damaged)
                header = json.loads(file.read(length))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; fetch the model again") from None
        except (struct.error, ValueError):
            raise ValueError(damaged) from None
        if not isinstance(header, dict):
            raise ValueError(damaged)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            try:
                kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                extent = math.prod(shape)
            except (KeyError, TypeError, ValueError):
                raise ValueError(damaged) from None
            if kind not in DTYPES:
                raise ValueError(
                    f"{path.name}: {name} has dtype {kind}, which is not supported; "
                    f"supported: {', '.join(DTYPES)}"
                )
            dtype = DTYPES[kind]
            if start < 0 or end - start != dtype.itemsize * extent or 8 + length + end > size:
                raise ValueError(damaged)
            self.tensors[name] = TensorInfo(shape, dtype)
            self._place[name] = (path, 8 + length + start)

    def _read(self, name: str) -> np.ndarray:
        info, (path, offset) = self.tensors[name], self._place[name]
        count = math.prod(info.shape)
        return np.fromfile(path, info.dtype, count, offset=offset).reshape(info.shape)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)
