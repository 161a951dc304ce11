"""The only module that names unstable jax.experimental APIs."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["gpu_interpreter", "interpreting", "pl", "plgpu", "require_hopper"]


def gpu_interpreter():
    """Context in which Mosaic GPU kernels run on the CPU; a read past an array's end gives NaN."""
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized"))


def interpreting() -> bool:
    """Whether kernels traced now run in interpret mode, which cannot execute inline Mosaic operations."""
    return jax._src.config.pallas_tpu_interpret_mode_context_manager.value is not None


def require_hopper(op: str) -> None:
    """Raises ValueError on a GPU other than Hopper; a machine without one may interpret or lower kernels."""
    if jax.default_backend() != "gpu":
        return
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":
        raise ValueError(
            f"{op}: mosaic_gpu needs compute capability 9.0, this GPU has {capability}; use backend='xla'"
        )
