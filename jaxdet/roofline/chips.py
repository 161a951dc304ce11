"""What is published of the chips that there are kernels for."""

import dataclasses

from jaxdet.roofline.kernel import Kernel

GB, GIB, MIB = 10**9, 2**30, 2**20
VECTOR_LANES = 8 * 128 * 4
"""Elementwise operations a cycle of a TPU core: 8 × 128 lanes of 4 units each (v5p, "How to Scale Your Model")."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them: a chip, or one of the two halves of a TPU7x."""

    name: str
    platform: str
    backend: str
    kinds: tuple[str, ...]
    """Its `device_kind`."""
    flops: float
    """Dense bfloat16 operations a second."""
    bandwidth: float
    """Bytes a second of HBM."""
    hbm: int
    """Bytes."""
    vmem: int
    """Bytes of on-chip memory that one kernel's blocks share: a TPU core's VMEM, an SM's shared memory."""
    vector: float
    """Elementwise float32 operations a second."""
    edges: tuple[int, int, int]
    """Rows, K and columns that the matrix unit pads a dot to."""
    cores: int = 1
    """TensorCores that this device joins."""

    def matrix_flops(self, kernel: Kernel) -> int:
        """Operations of the matrix unit, padding included."""
        m, k, n = self.edges
        return sum(2 * d.count * _up(d.rows, m) * _up(d.k, k) * _up(d.n, n) for d in kernel.dots)

    def seconds(self, kernel: Kernel) -> dict[str, float]:
        """One call's time on each unit, as if it were the only one; a call takes the longest of them.

        A kernel on one of two cores is given half of everything, HBM's bandwidth too.
        """
        share = 1 / self.cores if kernel.one_core else 1.0
        return {
            "HBM": kernel.bytes / (self.bandwidth * share),
            "matrix": self.matrix_flops(kernel) / (self.flops * share),
            "vector": kernel.vector / (self.vector * share),
        }


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# TPUs: operations, bandwidth and size of HBM are Google's, docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. VMEM and
# the edges of the matrix units are JAX's (jax/_src/tpu_info.py), which has 2.46e12 bytes a second for v5p.
CHIPS = (
    Chip(
        name="v5e",
        platform="tpu",
        backend="mosaic_tpu",
        kinds=("TPU v5 lite", "TPU v5e"),
        flops=197e12,
        bandwidth=819e9,
        hbm=16 * GIB,
        vmem=128 * MIB,
        vector=VECTOR_LANES * 1.5e9,  # the clock is 197e12 / (4 units · 128² · 2)
        edges=(8, 128, 128),
    ),
    Chip(
        name="v5p",
        platform="tpu",
        backend="mosaic_tpu",
        kinds=("TPU v5", "TPU v5p"),
        flops=459e12,
        bandwidth=2765e9,
        hbm=95 * GIB,
        vmem=64 * MIB,
        vector=2 * VECTOR_LANES * 1.75e9,  # 459e12 / (2 cores · 4 units · 128² · 2)
        edges=(8, 128, 128),
        cores=2,
    ),
    Chip(
        name="v6e",
        platform="tpu",
        backend="mosaic_tpu",
        kinds=("TPU v6 lite", "TPU v6e"),
        flops=918e12,
        bandwidth=1640e9,
        hbm=32 * GIB,
        vmem=128 * MIB,
        vector=VECTOR_LANES * 1.75e9,  # assumed to be a core of v5p: nothing is published
        edges=(8, 256, 256),
    ),
    Chip(
        name="7x",
        platform="tpu",
        backend="mosaic_tpu",
        kinds=("TPU7x",),
        flops=2307e12 / 2,  # Google's figures are for a chip, which is two devices
        bandwidth=7380e9 / 2,
        hbm=192 * GIB // 2,
        vmem=64 * MIB,
        vector=VECTOR_LANES * 1.75e9,  # assumed, as for v6e
        edges=(8, 256, 256),
    ),
    # GPUs, SXM: NVIDIA's data sheets of H100 and H200, bfloat16 without sparsity. 67e12 float32 operations a second
    # count a fused multiply-add as two. wgmma takes 64 rows, K in steps of 16 and columns in steps of 8; an SM has
    # 228 KiB of shared memory (CUDA C++ Programming Guide, compute capability 9.0).
    Chip(
        name="H100",
        platform="gpu",
        backend="mosaic_gpu",
        kinds=("NVIDIA H100 80GB HBM3",),
        flops=989.4e12,
        bandwidth=3350e9,
        hbm=80 * GB,
        vmem=228 * 1024,
        vector=67e12 / 2,
        edges=(64, 16, 8),
    ),
    Chip(
        name="H200",
        platform="gpu",
        backend="mosaic_gpu",
        kinds=("NVIDIA H200",),
        flops=989.4e12,
        bandwidth=4800e9,
        hbm=141 * GB,
        vmem=228 * 1024,
        vector=67e12 / 2,
        edges=(64, 16, 8),
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one that is not in the list."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
