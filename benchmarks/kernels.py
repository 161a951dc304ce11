"""Times the Hopper matmul beside XLA's dots and compares its bits across row counts; needs an H200.

    python benchmarks/kernels.py [seconds]

CUPTI medians; weights rotate so that L2 cannot hold them, and every call has its own x, because XLA merges dots
that share an operand. One JSON object a line.
"""

import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.matmul import mosaic_gpu_sm90 as kernel
from pallas_kernels.matmul.tuning_sm90 import tile

SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)}
ROWS = (1, 8, 64, 128, 192, 256, 512, 2048, 8192)
ODD_SHAPES = ((576, 960), (1000, 1000))
ODD_ROWS = (1, 2, 7, 8, 9, 63, 64, 65, 100, 130, 256, 513)


def median_us(f, xs, ws) -> tuple[float, float]:
    """(median, spread) of one product, in microseconds."""
    calls = jax.jit(lambda xs, ws: [f(x, w) for x, w in zip(xs, ws, strict=True)])
    _, times = profiler.measure(calls, iterations=10 if xs[0].shape[0] <= 512 else 4)(xs, ws)
    times = np.asarray(times) * 1e3 / len(ws)
    return float(np.median(times)), float(np.max(times) - np.min(times))


def differing_values(k: int, n: int) -> tuple[int, int]:
    """(values that differ from the 1024-row product, values compared)."""
    x = jax.random.normal(jax.random.key(1), (1024, k)).astype(jnp.bfloat16)
    w = (jax.random.normal(jax.random.key(2), (k, n)) * 0.02).astype(jnp.bfloat16)
    packed = kernel.pack(w)
    product = jax.jit(functools.partial(kernel.matmul, n=n))
    full = np.asarray(product(x, packed)).view(np.uint16)
    differ = compared = 0
    for rows in ODD_ROWS:
        got = np.asarray(product(x[:rows], packed)).view(np.uint16)
        differ, compared = differ + int((got != full[:rows]).sum()), compared + got.size
    return differ, compared


def main(seconds: float) -> None:
    start = time.time()
    assert jax.default_backend() == "gpu", "benchmarks need a GPU"
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)
    for k, n in ODD_SHAPES:
        differ, compared = differing_values(k, n)
        print(json.dumps({"bits": [k, n], "differ": differ, "compared": compared}), flush=True)
    for name, (k, n) in SHAPES.items():
        copies = max(2, int(3e8 // (k * n * 2)) + 1)
        ws = [
            jax.random.normal(jax.random.key(i), (k, n), jnp.bfloat16) * jnp.bfloat16(0.02)
            for i in range(copies)
        ]
        packed, transposed = [jax.jit(kernel.pack)(w) for w in ws], [jnp.array(w.T) for w in ws]
        for rows in ROWS:
            if time.time() - start > seconds:
                return
            xs = [jax.random.normal(jax.random.key(9 + i), (rows, k), jnp.bfloat16) for i in range(copies)]
            ours, spread = median_us(functools.partial(kernel.matmul, n=n), xs, packed)
            plain, _ = median_us(jnp.dot, xs, ws)
            turned, _ = median_us(
                lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), xs, transposed
            )
            row = {
                "shape": name,
                "M": rows,
                "us": ours,
                "spread": spread,
                "dot": plain,
                "dot_transposed": turned,
            }
            row |= {"ratio": min(plain, turned) / ours, "tile": str(tile(rows, k, n))}
            print(
                json.dumps({a: round(b, 3) if isinstance(b, float) else b for a, b in row.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0)
