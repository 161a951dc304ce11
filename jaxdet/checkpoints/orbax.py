"""Orbax directories: every tensor under its Hugging Face name, with config and tokenizer beside them."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdet.cast import cast
from jaxdet.checkpoints.base import Checkpoint, TensorInfo
from jaxdet.tokenizer import Tokenizer, read_json

ARRAYS = "arrays"
MANIFEST = "jaxdet.json"


class OrbaxCheckpoint(Checkpoint):
    """A directory made by `save_checkpoint(..., format="orbax")`; enough on its own.

    Raises:
        ValueError: the directory is damaged or incomplete.
    """

    def __init__(self, folder: Path):
        self.folder, self.name = folder.absolute(), folder.resolve().name
        self.config = read_json(folder / "config.json")
        manifest = read_json(folder / MANIFEST).get("tensors")
        if not self.config or not manifest:
            raise ValueError(f"{folder} lacks config.json or {MANIFEST}; convert the model again")
        try:
            self.tensors = {
                name: TensorInfo(tuple(map(int, entry["shape"])), np.dtype(jax.numpy.dtype(entry["dtype"])))
                for name, entry in manifest.items()
            }
            self._checksums = {name: int(entry["crc32"]) for name, entry in manifest.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{folder / MANIFEST} is damaged; convert the model again") from None
        if missing := [name for name in self.tensors if not (folder / ARRAYS / name / "_METADATA").exists()]:
            raise ValueError(f"{folder} lacks the tensor {missing[0]!r}; convert the model again")
        self._handler = ocp.StandardCheckpointer()

    def _read(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        return np.asarray(self._restore(name, jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=cpu)))

    def restore_sharded(self, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
        """Restores the named tensors straight into their shardings, each device reading its own part."""
        return {
            name: self._restore(
                name,
                jax.ShapeDtypeStruct(self.tensors[name].shape, self.tensors[name].dtype, sharding=sharding),
            )
            for name, sharding in shardings.items()
        }

    def _restore(self, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        try:
            value = self._handler.restore(self.folder / ARRAYS / name, {"value": target})["value"]
            # Orbax itself notices a damaged index, but not a flipped byte among the values.
            if value.is_fully_addressable and _checksum(np.asarray(value)) != self._checksums[name]:
                raise ValueError("wrong checksum")
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise ValueError(
                f"{self.folder}: tensor {name!r} is damaged ({_reason(error)}); convert the model again"
            ) from None
        return value

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)


def write_orbax(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes tensors one at a time, each as its own Orbax checkpoint, and the manifest that names them.

    float64 is written as float32: JAX would restore it as that.
    """
    manifest = {}
    with ocp.StandardCheckpointer() as handler:
        for name, value in tensors:
            if value.dtype == np.float64:
                value = cast(name, value, np.float32)
            manifest[name] = {
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "crc32": _checksum(value),
            }
            try:
                handler.save(folder.absolute() / ARRAYS / name, {"value": jax.numpy.asarray(value)})
                handler.wait_until_finished()
            except Exception as error:  # orbax and tensorstore raise many kinds
                raise OSError(
                    f"writing {name} failed ({_reason(error)}); free some disk space and run again"
                ) from None
    (folder / MANIFEST).write_text(json.dumps({"tensors": manifest}, indent=1))


def _checksum(value: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(value).view(np.uint8).data)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
