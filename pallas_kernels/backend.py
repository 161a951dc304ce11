"""Which backend serves this device, and what is known about the numerics of the `xla` one."""

import functools
import importlib.metadata
import logging
import platform
from pathlib import Path

import jax
import numpy as np

from pallas_kernels.attention.segment_tpu import MAX_HEAD_DIM
from pallas_kernels.attention.segments_sm90 import BLOCK, MOST_GROUPED_HEADS
from pallas_kernels.compat import cuda_libraries
from pallas_kernels.numerics import GPU_ATTENTION_TILES, GPU_ROW_TILES, ROW_TILE
from pallas_kernels.proven import ROWS

BACKENDS = ("xla", "mosaic_gpu", "mosaic_tpu")

# AVX-512 with bfloat16 products and without AMX is where the row count was proven not to touch the order of XLA's
# dots (tests/test_matmul.py): XLA has other kernels, with other orders, for every other set of instructions.
# Elsewhere every dot has `row_tile` rows, which needs no such proof.
ROW_FREE_ISAS = frozenset({"x86_64/avx512_bf16"})


def resolve(
    backend: str | None,
    *,
    dtype=None,
    head_dim: int | None = None,
    num_q_heads: int | None = None,
    num_kv_heads: int | None = None,
) -> str:
    """The backend's name: `backend` itself if it is known; if it is None, the device's default for such a model.

    The default is "mosaic_gpu" on a Hopper GPU and "mosaic_tpu" on a TPU for the dtypes and heads that their kernels
    take, else "xla"; a GPU or TPU that falls back to "xla" says why in the log, once. Without a model's dtype and heads
    it is "xla".

    Raises:
        ValueError: the name is unknown.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown; use one of {', '.join(BACKENDS)} or None")
        return backend
    platform = jax.default_backend()
    if platform not in ("gpu", "tpu") or dtype is None or not (head_dim and num_q_heads and num_kv_heads):
        return "xla"
    name, unlike = (
        ("mosaic_gpu", _unlike_mosaic_gpu) if platform == "gpu" else ("mosaic_tpu", _unlike_mosaic_tpu)
    )
    reason = unlike(np.dtype(dtype).name, head_dim, num_q_heads, num_kv_heads)
    if reason is None:
        return name
    _say_once(f"backend 'xla' instead of {name!r}: {reason}; batch-invariant too, but slower")
    return "xla"


def _unlike_mosaic_gpu(dtype: str, head_dim: int, num_q_heads: int, num_kv_heads: int) -> str | None:
    """Why the Hopper kernels don't take such a model on this GPU, or None."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability != "9.0":
        return f"compute capability {capability}, not 9.0"
    if dtype not in ("bfloat16", "float16"):
        return f"dtype {dtype}, not bfloat16 or float16"
    if head_dim not in BLOCK:
        return f"head_dim {head_dim}, not {', '.join(map(str, BLOCK))}"
    if num_q_heads // num_kv_heads > MOST_GROUPED_HEADS:
        return f"{num_q_heads // num_kv_heads} query heads a KV head, more than {MOST_GROUPED_HEADS}"
    return None


def _unlike_mosaic_tpu(dtype: str, head_dim: int, num_q_heads: int, num_kv_heads: int) -> str | None:
    """Why the TPU kernels don't take such a model, or None."""
    if dtype not in ("bfloat16", "float32"):
        return f"dtype {dtype}, not bfloat16 or float32"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim}, more than {MAX_HEAD_DIM}"
    return None


def default_dtype() -> str:
    """float32 on a CPU, elsewhere bfloat16, or float16 on an NVIDIA GPU without matrix units for bfloat16 (a T4)."""
    if jax.default_backend() == "cpu":
        return "float32"
    capability = getattr(jax.devices()[0], "compute_capability", "").partition(".")[0]
    return "float16" if capability.isdigit() and int(capability) < 8 else "bfloat16"


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


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


@functools.cache
def libraries(backend: str) -> str:
    """What a backend's kernels come from: libtpu, or cuBLAS, CUDA and its driver; "" on a CPU and for mosaic_gpu."""
    device = jax.devices()[0]
    if device.platform == "cpu" or backend == "mosaic_gpu":
        return ""
    cuda = cuda_libraries() if device.platform == "gpu" else {}
    version = device.client.platform_version.replace("\n", " ")
    return ", ".join([version, *(f"{name} {x}" for name, x in cuda.items())])


def rows_are_free() -> bool:
    """Whether XLA's dots on the default device may have any number of rows without changing a row's bits."""
    return jax.default_backend() == "cpu" and isa() in ROW_FREE_ISAS


def row_tile(dtype) -> int:
    """Rows of every dot of the xla backend where rows are not free and no larger ones are proven."""
    return GPU_ROW_TILES[np.dtype(dtype).itemsize] if jax.default_backend() == "gpu" else ROW_TILE


def larger_row_tiles(dtype) -> tuple[int, ...]:
    """Rows, ascending, that a dot may have beside `row_tile` if they are proven to give its bits; on GPUs alone, where
    a dot of few rows is bound by reading the weights."""
    if jax.default_backend() != "gpu":
        return ()
    return tuple(rows for rows in ROWS if rows > row_tile(dtype))


def attention_tiles() -> int:
    """Query tiles that the xla backend attends to in one dot where rows are not free."""
    return GPU_ATTENTION_TILES if jax.default_backend() == "gpu" else 1


def compiler_options(backend: str) -> dict[str, bool | int]:
    """What the outermost `jax.jit` around a model needs: `jax.jit(f, compiler_options=compiler_options(backend))`.

    XLA measures several kernels for a dot on a GPU and takes the fastest; another process may find another one fastest,
    whose sum has another order. These options make it take cuBLAS's first choice for the shape, and keep it from making
    one dot of a few that share an operand, as tiles share their weights.
    """
    if backend == "xla" and jax.default_backend() == "gpu":
        return {
            "xla_gpu_autotune_level": 0,
            "xla_gpu_enable_triton_gemm": False,
            "xla_gpu_dot_merger_threshold_mb": 0,
        }
    return {}
