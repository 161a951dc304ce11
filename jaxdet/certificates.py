"""What `jaxdet verify` found on this machine, kept for the engines that start later.

A note counts for the libraries that it was made with: another cuBLAS or driver has other kernels. And it vouches for no
larger tile that wasn't proven then.
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
from pallas_kernels.proven import BASE, Tiles

TESTED = {("cpu", "xla"), ("gpu", "mosaic_gpu")}
"""Platforms and backends that the project itself holds to the contract; on others it is this machine's own word."""


def keep(model: str, backend: str, dtype: str, *, compared: int, differing: int, tiles: Tiles = BASE) -> None:
    """Notes what a verification compared and found; a cache that can't be written keeps nothing.

    Args:
        tiles: those larger than the xla backend's base ones that were proven here.
    """
    path = _path(model, backend, dtype)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {
            "model": model,
            "libraries": libraries(),
            "compared": compared,
            "differing": differing,
            "larger_tiles": tiles._asdict(),
        }
        write_whole(path, json.dumps(note) + "\n")
    except OSError:
        return


def differing(model: str, backend: str, dtype: str, tiles: Tiles = BASE) -> int | None:
    """How many values differed when this model was last verified here; None if it never was as it runs now.

    Args:
        tiles: the larger tiles that the engine uses. Fewer than were proven then are fine, for any may be left out
            without changing a bit; others than were proven then are not. A failure stands whatever they are.
    """
    try:
        note = json.loads(_path(model, backend, dtype).read_text())
        found = int(note["differing"])
        known = all(
            set(used) <= {tuple(tile) for tile in note["larger_tiles"][kind]}
            for kind, used in tiles._asdict().items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found or known else None


def claimed(model: str, backend: str, dtype: str, tiles: Tiles = BASE) -> bool:
    """Whether equal bits may be claimed here: the model's last verification, or the project itself, stands for them."""
    found = differing(model, backend, dtype, tiles)
    return (jax.default_backend(), backend) in TESTED if found is None else found == 0


def say(model: str, backend: str, dtype: str, tiles: Tiles = BASE) -> None:
    """Warns of a machine that failed the model's verification, or needs one and has had none."""
    if claimed(model, backend, dtype, tiles):
        return
    found, log = differing(model, backend, dtype, tiles), logging.getLogger(__name__)
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
            "backend=%r was never certified on this %s, as it is now, with this model; "
            "`jaxdet verify %s --dtype %s` does so, once",
            backend,
            device,
            model,
            dtype,
        )


def _path(model: str, backend: str, dtype: str) -> Path:
    facts = f"{model} {backend} {dtype} {NUMERICS_VERSION} {libraries()}"
    name = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return cache_dir() / "certificates" / platform_key() / f"{name}.json"
