"""Lowered programs stay on disk: JAX's own cache is asked only after a program is lowered.

Python lowers a step of Hopper kernels in five to ten seconds and holds its lock meanwhile, so that an engine with
thirty buckets would spend minutes on it at every start. What is kept is StableHLO, which holds no Python objects; XLA
still compiles it, or finds it compiled in its own cache.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
from jax import export

import jaxdet.models
import pallas_kernels
from jaxdet.files import write_whole
from pallas_kernels.backend import platform_key

KERNELS = ("mosaic_gpu_v2",)
"""Custom calls that an export must be allowed to hold."""
SOURCES = (jaxdet.models, pallas_kernels)
"""Packages whose code decides what a program is, beside the file that calls `lower`."""


def folder(backend: str) -> Path | None:
    """Where programs of `backend` are kept, if they are slow to lower: beside JAX's cache of compiled ones."""
    compiled = jax.config.jax_compilation_cache_dir
    slow = backend == "mosaic_gpu" and jax.default_backend() == "gpu"
    return (
        Path(compiled) / "lowered" if slow and compiled and jax.config.jax_enable_compilation_cache else None
    )


def lower(
    function: Callable[..., Any],
    args: tuple,
    static: dict[str, Any],
    *,
    kept_in: Path,
    origin: tuple,
    jit: Callable[..., Any],
) -> jax.stages.Lowered:
    """`function`, jitted by `jit` and lowered for the arguments' shapes, from disk if it was lowered before.

    Args:
        args: arrays, or their shapes and dtypes.
        static: keyword arguments that are compiled in.
        kept_in: folder, made if it doesn't exist; where it can't be written, nothing is kept.
        origin: whatever else decides what the program is, as values whose `repr` tells them apart.
        jit: `jax.jit` with its options, donated arguments among them.
    """
    path = kept_in / f"{_key(args, static, origin)}.stablehlo"
    exported = _read(path)
    if exported is None:
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNELS]
        traced = jit(functools.partial(function, **static))
        exported = export.export(traced, disabled_checks=checks)(*args)
        with contextlib.suppress(OSError):  # a full disk or a read-only folder
            kept_in.mkdir(parents=True, exist_ok=True)
            write_whole(path, bytes(exported.serialize()))
    return jit(exported.call).lower(*args)


def _key(args: tuple, static: dict[str, Any], origin: tuple) -> str:
    leaves, tree = jax.tree.flatten(args)
    shapes = [(x.shape, str(x.dtype)) for x in leaves]
    settings = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    what = (shapes, str(tree), sorted(static.items()), settings, platform_key(), origin)
    return hashlib.sha256(f"{_code()} {what!r}".encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Digest of the code that programs come from, and the versions of what traces and lowers it."""
    digest = hashlib.sha256(f"{jax.__version__} {flax.__version__}".encode())
    roots = [Path(package.__path__[0]) for package in SOURCES]
    for path in sorted(
        [*Path(__file__).parent.glob("*.py"), *(p for root in roots for p in root.rglob("*.py"))]
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    try:
        return export.deserialize(bytearray(path.read_bytes()))
    except (
        Exception
    ):  # no file, a damaged one, or one that this JAX doesn't read: lowered again, and replaced
        return None
