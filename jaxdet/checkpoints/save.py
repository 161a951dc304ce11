"""Writes a checkpoint in another format: streamed, and renamed into place only when complete."""

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from tqdm import tqdm

from jaxdet.checkpoints.base import Checkpoint
from jaxdet.checkpoints.hf import DTYPES
from jaxdet.checkpoints.orbax import write_orbax

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_checkpoint(
    dst: str | Path,
    checkpoint: Checkpoint,
    *,
    format: Literal["safetensors", "orbax"],
    dtype: str | None = None,
    progress: bool = True,
) -> None:
    """Writes `checkpoint` to the new folder `dst`, with config and tokenizer.

    Args:
        dst: must not exist yet.
        format: "safetensors" (a Hugging Face folder) or "orbax".
        dtype: "float32", "bfloat16" or "float16"; each tensor's own by default.
        progress: show a progress bar.

    Raises:
        FileExistsError: `dst` exists.
    """
    dst = Path(dst)
    if dst.exists():
        raise FileExistsError(f"DST {dst} exists; choose another name or remove it")
    target = None if dtype is None else np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    dst.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}-"))
    try:
        config = checkpoint.config | ({"torch_dtype": dtype} if dtype else {})
        (work / "config.json").write_text(json.dumps(config, indent=1))
        checkpoint.tokenizer().save(work)
        tensors = _converted(checkpoint, target, progress)
        if format == "orbax":
            write_orbax(work, tensors)
        else:
            _write_safetensors(work / "model.safetensors", checkpoint, tensors, target)
        work.chmod(0o755)
        work.replace(dst)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _converted(
    checkpoint: Checkpoint, dtype: np.dtype | None, progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for name in tqdm(sorted(checkpoint.tensors), desc="Converting", unit="tensor", disable=not progress):
        value = checkpoint.read(name)
        yield name, value if dtype is None else value.astype(dtype)


def _write_safetensors(path: Path, checkpoint: Checkpoint, tensors, dtype: np.dtype | None) -> None:
    """The format's own writer wants all tensors at once; its layout is a header and the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        kind = dtype or info.dtype
        size = kind.itemsize * int(np.prod(info.shape))
        header[name] = {"dtype": NAMES[kind], "shape": list(info.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, value in tensors:
            file.write(np.ascontiguousarray(value).view(np.uint8).data)
