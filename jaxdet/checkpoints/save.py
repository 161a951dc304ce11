"""Writes a checkpoint in another format: streamed, and renamed into place only when complete."""

import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tqdm import tqdm

from jaxdet.cast import cast
from jaxdet.checkpoints.base import Checkpoint
from jaxdet.checkpoints.hf import INDEX
from jaxdet.checkpoints.orbax import write_orbax
from jaxdet.heap import freed_at_once

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
SHARD_BYTES = 2**30
"""Also the memory that writing takes: a shard is written at once."""


def save_checkpoint(
    dst: str | Path,
    checkpoint: Checkpoint,
    *,
    format: Literal["safetensors", "orbax"],
    dtype: str | None = None,
    progress: bool = True,
) -> None:
    """Writes `checkpoint` to the new folder `dst`, with config and tokenizer; a failure leaves nothing behind.

    Args:
        dst: must not exist yet.
        format: "safetensors" (a Hugging Face folder) or "orbax".
        dtype: "float32", "bfloat16" or "float16"; each tensor's own by default (in orbax, float32 for float64).
        progress: show a progress bar.

    Raises:
        FileExistsError: `dst` exists.
        ValueError: `format` or `dtype` is unknown, a value overflows `dtype`, or the checkpoint is damaged
            or can't be stated in `format`.
        OSError: `dst` can't be written, or the disk is too small for it.
    """
    dst = Path(dst).expanduser()
    if format not in ("safetensors", "orbax"):
        raise ValueError(f"format={format!r} is unknown; use safetensors or orbax")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    if dst.exists():
        raise FileExistsError(f"DST {dst} exists; choose another name or remove it")
    scaling = checkpoint.config.get("rope_scaling")
    if format == "safetensors" and isinstance(scaling, dict) and scaling.get("rope_type") == "factors":
        raise ValueError(
            f"{checkpoint.name} has rope factors that no config.json can state; convert it to orbax"
        )
    target = None if dtype is None else DTYPES[dtype]
    sizes = {
        name: (target or info.dtype).itemsize * math.prod(info.shape)
        for name, info in sorted(checkpoint.tensors.items())
    }
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}-"))
    except OSError as error:
        raise OSError(f"DST {dst} can't be written ({error.strerror}); choose another place") from None
    try:
        if (free := shutil.disk_usage(work).free) < sum(sizes.values()):
            raise OSError(
                f"DST {dst} needs {sum(sizes.values()) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                "free some or choose another disk"
            )
        config = checkpoint.config
        if dtype is not None:  # transformers 5 reads dtype, earlier ones torch_dtype
            config = config | {"dtype": dtype, "torch_dtype": dtype}
        (work / "config.json").write_text(json.dumps(config, indent=1))
        checkpoint.tokenizer().save(work)
        tensors = _converted(checkpoint, sizes, target, progress)
        with freed_at_once():
            if format == "orbax":
                write_orbax(work, tensors)
            else:
                _write_shards(work, tensors, sizes)
        work.chmod(0o755)
        work.replace(dst)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _converted(
    checkpoint: Checkpoint, names: dict[str, int], dtype: np.dtype | None, progress: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for name in tqdm(names, desc="Converting", unit="tensor", disable=not progress):
        value = checkpoint.read(name)
        yield name, value if dtype is None else cast(name, value, dtype)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], sizes: dict[str, int]) -> None:
    """Files of at most SHARD_BYTES (or one larger tensor), and the index that `from_pretrained` looks for."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    place = {
        name: "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i, names in enumerate(shards, 1)
        for name in names
    }
    for file, shard in itertools.groupby(tensors, lambda tensor: place[tensor[0]]):
        _write_shard(folder / file, {name: np.ascontiguousarray(value) for name, value in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise OSError(f"writing {path.name} failed ({error}); free some disk space and run again") from None
