"""NVIDIA GPUs that are not here: compiles a step's programs for each with JAX's CUDA plugin, on a CPU."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental import topologies
from tpu_chips import nothing_kept

FOLDER = Path(sys.prefix) / "cuda"
"""Out of Python's sight, as libtpu is."""

needs_plugin = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the CUDA plugin is published for Linux alone"
)


class Chip(NamedTuple):
    """What XLA asks about a GPU, as far as its choices depend on it; from NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory_gb: int
    bandwidth_gb: int
    l2_mb: int
    shared_kb: int
    """Of a core; a block may have one less."""
    threads: int
    """Of a core."""

    @property
    def described(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
            gpu_device_info {{
              name: "{self.name}" device_vendor: "NVIDIA Corporation"
              platform_version: "Compute Capability {major}.{minor}"
              cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
              core_count: {self.cores} fpus_per_core: {64 if self.capability in ((7, 5), (8, 0)) else 128}
              clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_gb * 10**9}
              memory_bandwidth: {self.bandwidth_gb * 10**9} l2_cache_size: {self.l2_mb * 2**20}
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {self.threads}
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_kb * 1024}
              shared_memory_per_block_optin: {(self.shared_kb - (major > 7)) * 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
              dnn_version: "9.10.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


CHIPS = {
    "T4": Chip("Tesla T4", (7, 5), 40, 1.59, 16, 320, 4, 64, 1024),
    "L4": Chip("NVIDIA L4", (8, 9), 58, 2.04, 24, 300, 48, 100, 1536),
    "A100": Chip("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40, 1555, 40, 164, 2048),
    "H200": Chip("NVIDIA H200", (9, 0), 132, 1.98, 141, 4800, 50, 228, 2048),
}


def compile_for(
    chip: str, function: Callable, *operands: Any, jit: Callable = jax.jit
) -> jax.stages.Compiled:
    """Compiles `function` of operands, or of their shapes, for the chip."""
    place = jax.sharding.SingleDeviceSharding(_device(chip))

    def put(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if hasattr(x, "dtype") else x

    with nothing_kept():
        traced = jit(function).trace(*jax.tree.map(put, operands))
        return traced.lower(lowering_platforms=("cuda",)).compile()


@functools.cache
def _device(chip: str):
    _load()
    described = CHIPS[chip].described
    return topologies.get_topology_desc(
        chip, platform="cuda", target_config=described, topology="1x1x1"
    ).devices[0]


@functools.cache
def _load() -> None:
    if not (FOLDER / "jax_plugins").exists():
        raise FileNotFoundError(f"{FOLDER} has no CUDA plugin; run `make .venv/cuda/.ready`")
    runtime = FOLDER / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
    # What Mosaic's kernels are linked with.
    os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(runtime))
    jax.devices()  # those that are here come first: JAX looks for no others later
    sys.path.insert(0, str(FOLDER))
    try:
        import jax_plugins.xla_cuda13

        jax_plugins.xla_cuda13.initialize()
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # a plugin in the environment, which JAX has found by itself
            raise
    finally:
        sys.path.remove(str(FOLDER))
