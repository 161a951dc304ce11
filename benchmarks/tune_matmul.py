"""Measures tiles of the Hopper matmul and writes its table; needs a Hopper GPU.

    python benchmarks/tune_matmul.py OUT [rows ...]

For each matrix of the models below and each bucket of rows the candidates that fit are compiled and timed (CUPTI,
weights rotated so that L2 cannot hold them), and the fastest goes to OUT/tuning_sm90.json; buckets that were not asked
for keep their entries. All candidates of a point must give one bit pattern, or it fails.
"""

import concurrent.futures
import json
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from kernels import L2_BYTES, kernel_times, normal

from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import DEFAULT, ROW_BUCKETS, TABLE, Tile, tile

SHAPES = (  # (K, columns as packed, gated, residual)
    (4096, 6144, False, False),  # Qwen3-8B
    (4096, 4096, False, True),
    (4096, 24576, True, False),
    (12288, 4096, False, True),
    (4096, 151936, False, False),
)
MOST_HEAD_ROWS = 1024
CANDIDATES = 10


def candidates(rows: int, k: int, columns: int, gated: bool) -> list[Tile]:
    """What is in the table, and the tiles that keep the SMs busiest and load the least."""
    ranked = []
    for height, groups in ((64, 1), (128, 1), (128, 2), (192, 3), (256, 2)):
        for width in (32, 48, 64, 96, 128, 144, 160, 192, 256):
            if (rows % height and rows > 64) or columns % width or (gated and width % 64):
                continue
            if height // groups * width > 128 * 192:  # the accumulator must fit the registers
                continue
            tiles = -(-rows // height) * (columns // width)
            waves = math.ceil(tiles / matmul.SMS)
            # What a wave costs: products at the rate of one SM, loads of a tile's operands, a fixed start.
            work = max(height * width / 128, 0.55 * (height + width)) + 6
            ranked.append((waves * work, height, width, groups))
    bands = (8, 16) if rows >= 2048 else (16,)
    found = {tile(rows, k, columns): None}
    for _, height, width, groups in sorted(ranked)[: CANDIDATES // len(bands)]:
        for depth in (64, 128) if height + width <= 128 else (64,):
            for band in bands:
                found[Tile(height, width, depth, groups, band)] = None
    return list(found)


def point(rows, k, columns, gated, residual, threads):
    """(tile, median µs) of every candidate, fastest first."""
    copies = 1 if columns > 2**16 else int(2 * L2_BYTES // (k * columns * 2)) + 2
    weights = [normal(i, k // 64, columns, 64, scale=0.02) for i in range(copies)]
    x, added = normal(9, rows, k), normal(8, rows, columns)
    out_dtype = jnp.float32 if columns > 2**16 else jnp.bfloat16

    def compiled(candidate):
        def call(x, w, *residual):
            if gated:
                return matmul.gated_matmul(x, w, n=columns // 2, activation="silu", tile=candidate)
            added = residual[0] if residual else None
            return matmul.matmul(x, w, n=columns, residual=added, out_dtype=out_dtype, tile=candidate)

        return jax.jit(call).lower(*operands[0]).compile()

    operands = [(x, w, added) if residual else (x, w) for w in weights]
    jobs = [
        (candidate, threads.submit(compiled, candidate)) for candidate in candidates(rows, k, columns, gated)
    ]
    for candidate, job in jobs:
        if job.exception():
            print(json.dumps({"tile": str(candidate), "failed": f"{job.exception()!r:.200}"}), flush=True)
    calls = [(candidate, job.result()) for candidate, job in jobs if not job.exception()]
    wanted = calls[0][1](*operands[0])
    for candidate, call in calls:
        if count := int(unlike(call(*operands[0]), wanted)):
            raise AssertionError(f"{candidate}: {count} values unlike those of {calls[0][0]}")
    every = [(call, *arguments) for _, call in calls for arguments in operands]
    rounds = kernel_times(lambda call, *arguments: call(*arguments), every, 7 if rows <= 1024 else 3)
    times = np.median(np.array(rounds).reshape(-1, len(calls), copies).mean(axis=2), axis=0)
    return sorted(zip(times.tolist(), (candidate for candidate, _ in calls), strict=True), key=lambda t: t[0])


@jax.jit
def unlike(a, b):
    """How many bit patterns differ."""
    a, b = (jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in (a, b))
    return jnp.sum(a != b)


def fields(chosen: Tile) -> list[int]:
    return [chosen.rows, chosen.columns, chosen.depth, chosen.row_groups, chosen.band]


def main(out: pathlib.Path, rows) -> None:
    assert jax.default_backend() == "gpu", "needs a Hopper GPU"
    table = {shape: dict(buckets) for shape, buckets in TABLE.items()}
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "measured": time.strftime("%Y-%m-%d"),
        "tiles": table,
    }
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        for bucket in rows or ROW_BUCKETS:
            for k, columns, gated, residual in SHAPES:
                if columns > 2**16 and bucket > MOST_HEAD_ROWS:
                    continue
                times = point(bucket, k, columns, gated, residual, threads)
                before = {t: us for us, t in times}.get(tile(bucket, k, columns), math.nan)
                us, chosen = times[0]
                row = {"K": k, "columns": columns, "rows": bucket, "us": round(us, 1), "tile": fields(chosen)}
                row |= {
                    "before": round(before, 1),
                    "next": [(round(u, 1), fields(t)) for u, t in times[1:4]],
                }
                print(json.dumps(row | {"TFLOP/s": round(2 * bucket * k * columns / us / 1e6)}), flush=True)
                entries = table.setdefault(f"{k}x{columns}", {})
                entries.pop(str(bucket), None)
                if chosen != DEFAULT[bucket]:
                    entries[str(bucket)] = fields(chosen)
                (out / "tuning_sm90.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), [int(r) for r in sys.argv[2:]])
