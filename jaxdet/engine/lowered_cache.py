"""Lowered programs stay on disk: JAX's own cache is asked only after a program is lowered.

Python lowers a step of Hopper kernels in five to ten seconds and holds its lock meanwhile, so that an engine with
thirty buckets would spend minutes on it at every start. What is kept is StableHLO, which holds no Python objects; XLA
still compiles it, or finds it compiled in its own cache. At the first start several processes lower (`lowering.py`).
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
    """Where programs of `backend` for this device are kept, if they are slow to lower: in JAX's cache's folder."""
    compiled = jax.config.jax_compilation_cache_dir
    slow = backend == "mosaic_gpu" and jax.default_backend() == "gpu"
    if not (slow and compiled and jax.config.jax_enable_compilation_cache):
        return None
    return Path(compiled) / "lowered" / platform_key()


class Program(NamedTuple):
    """What is lowered, and whatever decides what comes out."""

    function: Callable[..., Any]
    args: tuple
    """Arrays, or their shapes and dtypes."""
    static: dict[str, Any]
    """Keyword arguments that are compiled in."""
    origin: tuple
    """Whatever else decides what the program is, as values whose `repr` tells them apart."""
    jit: Callable[..., Any]
    """`jax.jit` with its options, donated arguments among them."""


def lower(program: Program, kept_in: Path) -> jax.stages.Lowered:
    """From disk if it was lowered before; where `kept_in` can't be written, nothing is kept."""
    exported = _read(path(program, kept_in)) or keep(program, kept_in)
    return program.jit(exported.call).lower(*program.args)


def keep(program: Program, kept_in: Path, platform: str | None = None) -> export.Exported:
    """Lowers a program as `exported_of` does and writes it to the folder, which is made if it doesn't exist."""
    jitted = program.jit(functools.partial(program.function, **program.static))
    exported = exported_of(jitted, program.args, platform)
    with contextlib.suppress(OSError):  # a full disk or a read-only folder
        kept_in.mkdir(parents=True, exist_ok=True)
        write_whole(path(program, kept_in), bytes(exported.serialize()))
    return exported


def exported_of(jitted: jax.stages.Wrapped, args: tuple, platform: str | None = None) -> export.Exported:
    """A jitted function lowered for arguments, or their shapes and dtypes; it may hold our kernels.

    Args:
        platform: "cuda" in a process that has no GPU; this process's own by default.
    """
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in KERNELS]
    platforms = None if platform is None else [platform]
    return export.export(jitted, disabled_checks=checks, platforms=platforms)(*args)


def path(program: Program, kept_in: Path) -> Path:
    """The program's file."""
    return kept_in / f"{_key(program)}.stablehlo"


def _key(program: Program) -> str:
    leaves, tree = jax.tree.flatten(program.args)
    shapes = [(x.shape, str(x.dtype)) for x in leaves]
    what = (shapes, str(tree), sorted(program.static.items()), settings(), program.origin)
    return hashlib.sha256(f"{_code()} {what!r}".encode()).hexdigest()


def settings() -> dict[str, Any]:
    """JAX's settings that decide what a program is."""
    return {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_default_matmul_precision")}


@functools.cache
def _code() -> str:
    """Digest of the code and the tables that programs come from, and the versions of what traces and lowers it."""
    digest = hashlib.sha256(f"{jax.__version__} {flax.__version__}".encode())
    roots = [Path(package.__path__[0]) for package in SOURCES]
    parts = (p for root in roots for kind in ("*.py", "*.json") for p in root.rglob(kind))
    for path in sorted([*Path(__file__).parent.glob("*.py"), *parts]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    try:
        return export.deserialize(bytearray(path.read_bytes()))
    except (
        Exception
    ):  # no file, a damaged one, or one that this JAX doesn't read: lowered again, and replaced
        return None
