"""Which backend serves this device, and what is known about the numerics of the `xla` one."""

import functools
import importlib.metadata
import platform

import jax
import numpy as np

BACKENDS = ("xla", "mosaic_gpu", "mosaic_tpu")

# x86-64-v4 (AVX-512) is where the row count was proven not to touch the order of XLA's dots (tests/test_matmul.py).
# Elsewhere every dot has ROW_TILE rows, which needs no such proof.
ROW_FREE_ISAS = frozenset({"x86_64/avx512"})


def resolve(backend: str | None) -> str:
    """The backend's name: `backend` itself if it is known, the device's default if it is None.

    Raises:
        ValueError: the name is unknown.
    """
    if backend is None:
        return "xla"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)} or None")
    return backend


@functools.cache
def isa() -> str:
    """The vector unit that decides the CPU's bits, such as "x86_64/avx512"; part of every digest's key."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    found = np.show_config(mode="dicts")["SIMD Extensions"]
    features = {*found.get("baseline", ()), *found.get("found", ())}
    if machine == "x86_64":
        if features & {"X86_V4", "AVX512_SKX"}:
            return "x86_64/avx512"
        return "x86_64/avx2" if features & {"X86_V3", "AVX2"} else "x86_64/sse"
    return machine


def platform_key() -> str:
    """What bits depend on besides the program: device kind (or the CPU's ISA) and jaxlib's version."""
    device = jax.devices()[0]
    kind = isa() if device.platform == "cpu" else device.device_kind.replace(" ", "-")
    return f"{device.platform}/{kind}/jaxlib-{importlib.metadata.version('jaxlib')}"


def rows_are_free() -> bool:
    """Whether XLA's dots on the default device may have any number of rows without changing a row's bits."""
    return jax.default_backend() == "cpu" and isa() in ROW_FREE_ISAS
