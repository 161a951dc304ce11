"""TPUs that are not here: compiles a function for each chip with libtpu, on a CPU."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies

from pallas_kernels.compat import reset_compilation_cache

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
VMEM = {"v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}
"""MiB a core."""
HBM = {"v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
"""GiB a device: a chip, or a core of tpu7x."""
LIBRARY = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"

needs_libtpu = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64",
    reason="libtpu is published for x86_64 Linux alone",
)


class Compiled(NamedTuple):
    """A program for a TPU and the seconds that its compilation took."""

    program: jax.stages.Compiled
    lowered: jax.stages.Lowered
    seconds: float

    @property
    def text(self) -> str:
        """The optimised HLO."""
        return self.program.as_text() or ""

    @property
    def unoptimised(self) -> str:
        """HLO before XLA changes anything, with the source of every op."""
        return self.lowered.as_text("hlo", debug_info=True)


def compile_for(chip: str, function: Callable, *operands: Any, jit: Callable = jax.jit) -> Compiled:
    """Compiles `function` of operands, or of their shapes, for one device of `chip`."""
    device = _device(chip)
    place = jax.sharding.SingleDeviceSharding(device)
    operands = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), operands)
    started = time.perf_counter()
    with pretending(chip), nothing_kept():
        lowered = jit(function).trace(*operands).lower(lowering_platforms=("tpu",))
        program = lowered.compile()
    return Compiled(program, lowered, time.perf_counter() - started)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """JAX would keep programs on disk, and fail to read them the next time: that takes the chip itself."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_compilation_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_compilation_cache()


def pretending(chip: str) -> contextlib.AbstractContextManager:
    """Context in which Mosaic lowers for that chip, not for the machine that it runs on."""
    mesh = jax.sharding.Mesh([_device(chip)], ("device",))
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


@functools.cache
def _device(chip: str):
    if not LIBRARY.exists():
        raise FileNotFoundError(f"{LIBRARY} is missing; run `make .venv/libtpu/.ready`")
    os.environ["TPU_LIBRARY_PATH"] = str(LIBRARY)
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # one process at a time may hold a TPU; here is none
    return topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
