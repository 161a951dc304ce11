"""The only module that names unstable jax.experimental APIs."""

import functools

import jax
from jax._src.lib.mlir.dialects import arith as mlir_arith
from jax._src.lib.mlir.dialects import math as mlir_math
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache.compilation_cache import reset_cache as reset_compilation_cache
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

__all__ = [
    "add_rounded",
    "fused_multiply_add",
    "gpu_interpreter",
    "interpreting",
    "kernel_in_place",
    "pl",
    "plgpu",
    "pltpu",
    "reduce_columns",
    "require_hopper",
    "reset_compilation_cache",
    "tpu_interpreter",
]


def gpu_interpreter():
    """Context in which Mosaic GPU kernels run on the CPU; a read past an array's end gives NaN."""
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized"))


def tpu_interpreter(*, simulate: bool = True):
    """Context in which Mosaic TPU kernels run on the CPU.

    Args:
        simulate: step by step, copies done when they are waited for, and NaN in memory that nothing wrote; else as
            one XLA program, several times as fast.
    """
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams() if simulate else True)  # type: ignore[arg-type]


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


def kernel_in_place(body, *, out_type, scratch_types, grid, grid_names):
    """`plgpu.kernel` of one warpgroup a CTA whose inputs may be `jax.Ref`s that it writes, which that one refuses."""

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), *scratch_types, collective_axes=())

    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names)
    return pl.kernel(scoped, out_type=out_type, mesh=mesh)


def fused_multiply_add(a, b, c, layout):
    """a · b + c with one rounding, inside a Mosaic GPU kernel; the interpreter may round twice."""
    if interpreting():
        return a * b + c

    @plgpu.inline_mgpu(
        arg_types=(layout,) * 3,
        return_type=plgpu.ShapeDtypeStruct(c.shape, c.dtype, layout=layout),
    )
    def fma(_, x, y, z):
        return x._pointwise(mlir_math.fma, y, z)

    return fma(a, b, c)


def add_rounded(a, b, layout):
    """a + b, inside a Mosaic GPU kernel; Mosaic's own sum lets the compiler fuse a product in a or b into it."""
    if interpreting():
        a, b = jax.lax.optimization_barrier((a, b))
        return a + b

    @plgpu.inline_mgpu(
        arg_types=(layout,) * 2,
        return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout),
    )
    def add(_, x, y):
        return x._pointwise(mlir_arith.addf, y)

    return add(a, b)


def reduce_columns(x, layout, row_layout):
    """Sum over the columns of a [rows, columns] WGMMA tile in one tree, whatever the number of rows.

    Mosaic's own `sum` picks its tree from the rows a warpgroup holds. Column 8g + 2t + e: even g ascending
    plus odd g ascending, then e = 0 plus e = 1, then (t₀ + t₁) + (t₂ + t₃).
    """
    if interpreting():
        return x.sum(axis=1)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct((x.shape[0],), x.dtype, layout=row_layout),
    )
    def pinned(_, tile):
        return tile.reduce("add", 1, acc_ilp=x.shape[0] // 8)

    return pinned(x)
