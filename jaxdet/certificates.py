"""What `jaxdet verify` found on this machine, kept for the engines that start later.

A success counts for the libraries that it was made with: another cuBLAS or driver has other kernels. A failure stands
until a verification takes it back. Larger tiles need no note: an engine itself proves those that it uses, at its start.
"""

import hashlib
import json
import logging
from pathlib import Path

import jax

from jaxdet.checkpoints.demo import cache_dir
from jaxdet.files import write_whole
from pallas_kernels.backend import libraries, platform_key
from pallas_kernels.numerics import NUMERICS_VERSION

TESTED = {("cpu", "xla"), ("gpu", "mosaic_gpu")}
"""Platforms and backends that the project itself holds to the contract; on others it is this machine's own word."""


def keep(model: str, backend: str, dtype: str, *, compared: int, differing: int, tiles: str = "") -> None:
    """Notes what a verification compared and found; a cache that can't be written keeps nothing.

    Args:
        tiles: what ran in larger tiles than the xla backend's base ones, for people.
    """
    path = _path(model, backend, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {
            "model": model,
            "libraries": libraries(backend),
            "compared": compared,
            "differing": differing,
            "larger_tiles": tiles,
        }
        write_whole(path, json.dumps(note) + "\n")
    except OSError:
        return


def differing(model: str, backend: str, dtype: str) -> int | None:
    """How many values differed when this model was last verified here; None if it never was with today's libraries."""
    try:
        note = json.loads(_path(model, backend, dtype).read_text())
        found, current = int(note["differing"]), note.get("libraries", "") == libraries(backend)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found or current else None


def claimed(model: str, backend: str, dtype: str) -> bool:
    """Whether equal bits may be claimed here: the model's last verification, or the project itself, stands for them."""
    found = differing(model, backend, dtype)
    return (jax.default_backend(), backend) in TESTED if found is None else found == 0


def say(model: str, backend: str, dtype: str) -> None:
    """Warns of a machine that failed the model's verification, or needs one and has had none."""
    if claimed(model, backend, dtype):
        return
    found, log = differing(model, backend, dtype), logging.getLogger(__name__)
    device = jax.devices()[0].device_kind
    if found:
        log.warning(
            "determinism is NOT claimed on this %s: `jaxdet verify` found %d differing values with backend=%r and "
            "dtype=%r; use another backend or dtype",
            device,
            found,
            backend,
            dtype,
        )
    else:
        log.warning(
            "backend=%r was never certified on this %s with this model and its present libraries; "
            "`jaxdet verify %s --dtype %s` does so, once",
            backend,
            device,
            model,
            dtype,
        )


def _path(model: str, backend: str, dtype: str) -> Path:
    name = hashlib.sha256(f"{model} {backend} {dtype} {NUMERICS_VERSION}".encode()).hexdigest()[:16]
    return cache_dir() / "certificates" / platform_key() / f"{name}.json"
