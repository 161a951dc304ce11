"""Which backend serves this device, and what is known about the numerics of the `xla` one."""

import functools
import importlib.metadata
import platform
from pathlib import Path

import jax
import numpy as np

BACKENDS = ("xla", "mosaic_gpu", "mosaic_tpu")

# AVX-512 with bfloat16 products and without AMX is where the row count was proven not to touch the order of XLA's
# dots (tests/test_matmul.py): XLA has other kernels, with other orders, for every other set of instructions.
# Elsewhere every dot has ROW_TILE rows, which needs no such proof.
ROW_FREE_ISAS = frozenset({"x86_64/avx512_bf16"})


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
    """The vector unit that decides the CPU's bits, such as "x86_64/avx512_bf16"; part of every digest's key."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    found = np.show_config(mode="dicts")["SIMD Extensions"]
    features = {*found.get("baseline", ()), *found.get("found", ())}
    if machine == "x86_64":
        if features & {"X86_V4", "AVX512_SKX"}:
            return f"x86_64/{_avx512_kind()}"
        return "x86_64/avx2" if features & {"X86_V3", "AVX2"} else "x86_64/sse"
    return machine


def _avx512_kind() -> str:
    """Which dots an AVX-512 CPU has in hardware, as Linux says; NumPy doesn't know of bfloat16 and AMX."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    if "amx_bf16" in flags:
        return "avx512_amx"
    return "avx512_bf16" if "avx512_bf16" in flags else "avx512"


def platform_key() -> str:
    """What bits depend on besides the program: device kind (or the CPU's ISA) and jaxlib's version."""
    device = jax.devices()[0]
    kind = isa() if device.platform == "cpu" else device.device_kind.replace(" ", "-")
    return f"{device.platform}/{kind}/jaxlib-{importlib.metadata.version('jaxlib')}"


def rows_are_free() -> bool:
    """Whether XLA's dots on the default device may have any number of rows without changing a row's bits."""
    return jax.default_backend() == "cpu" and isa() in ROW_FREE_ISAS
