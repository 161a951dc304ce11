"""The public recipe for a batch-invariant product on a GPU, to compare with: persistent, one fixed tile for all sizes.

After "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab, 2025): one program sums an output tile of
128 × 128 in steps of 64, whatever the number of rows. Needs torch and triton.
"""

import torch
import triton
import triton.language as tl

TILE_M, TILE_N, TILE_K, BAND = 128, 128, 64, 8


@triton.jit
def _kernel(
    x, w, out, m, n, k, programs, tm: tl.constexpr, tn: tl.constexpr, tk: tl.constexpr, band: tl.constexpr
):
    """x [m, k] and w [n, k] by rows."""
    down, across = tl.cdiv(m, tm), tl.cdiv(n, tn)
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        first = tile // (band * across) * band
        height = min(down - first, band)
        row, column = first + tile % (band * across) % height, tile % (band * across) // height
        rows, columns = row * tm + tl.arange(0, tm), column * tn + tl.arange(0, tn)
        at, total = tl.arange(0, tk), tl.zeros((tm, tn), tl.float32)
        left = tl.where(rows < m, rows, 0)[:, None] * k
        right = tl.where(columns < n, columns, 0)[None, :] * k
        for step in range(tl.cdiv(k, tk)):
            here = step * tk + at
            a = tl.load(x + left + here[None, :], mask=(here < k)[None, :], other=0.0)
            b = tl.load(w + right + here[:, None], mask=(here < k)[:, None], other=0.0)
            total = tl.dot(a, b, total)
        where = rows[:, None].to(tl.int64) * n + columns[None, :]
        tl.store(
            out + where, total.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :]
        )


def matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transpose of w [N, K], both contiguous, in x's dtype."""
    (m, k), n = x.shape, w.shape[0]
    out = torch.empty(m, n, device=x.device, dtype=x.dtype)
    programs = min(
        torch.cuda.get_device_properties(x.device).multi_processor_count,
        triton.cdiv(m, TILE_M) * triton.cdiv(n, TILE_N),
    )
    _kernel[(programs,)](
        x, w, out, m, n, k, programs, TILE_M, TILE_N, TILE_K, BAND, num_warps=8, num_stages=3
    )
    return out
