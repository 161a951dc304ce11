"""Where the time of a step goes, kernel by kernel; needs a Hopper GPU.

    python benchmarks/step_profile.py [KIND,SEQUENCES,KEYS ...] [--layers 36] [--backend mosaic_gpu]

A model of Qwen3-8B's shape with random weights: decode steps of several batches and one prefill, without sampling;
with --backend xla in its base tiles, and in the larger ones that the device proves first.
Per kernel: launches and microseconds a step (CUPTI), and how much of its own limit it reaches: the bytes that it must
move at the rate at which a large array is read, or its operations at that of a large matrix product, measured first.
Under each table the sum of the kernels, the host's time a step in a row of steps, and the gaps between them.
"""

import argparse
import collections
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from kernels import ceilings, cupti_times, normal

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.larger_tiles import described, prove
from jaxdet.models.layers import Batch
from jaxdet.testing import QWEN3_8B, random_model
from pallas_kernels.backend import compiler_options
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.proven import BASE, with_tiles

HIDDEN, VOCAB, DIM = QWEN3_8B["hidden_size"], QWEN3_8B["vocab_size"], QWEN3_8B["head_dim"]
HEADS, KV_HEADS = QWEN3_8B["num_attention_heads"], QWEN3_8B["num_key_value_heads"]
STEPS = (
    ("decode", 1, 200),
    ("decode", 64, 200),
    ("decode", 256, 200),
    ("decode", 1000, 200),
    ("decode", 1, 8192),
    ("prefill", 1, 8192),
)


def batch_of(kind: str, sequences: int, length: int) -> tuple[Batch, int]:
    """A step over `sequences` of `length` keys in shuffled pages, and how many pages the cache needs."""
    pages, count = -(-length // PAGE_SIZE), 1 if kind == "decode" else length
    order = np.random.default_rng(0).permutation(sequences * pages) + 1
    tables = np.zeros((sequences, max(32, pages)), np.int32)
    tables[:, :pages] = order.reshape(sequences, pages)
    positions = np.tile(np.arange(length - count, length, dtype=np.int32), sequences)
    owner = np.repeat(np.arange(sequences), count)
    slots = tables[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
    rows = sequences if kind == "decode" else 0
    starts, lens = np.arange(1 if rows else sequences + 1) * count, np.full(sequences, length)
    arrays = (
        positions % VOCAB,
        positions,
        slots,
        tables[:rows],
        lens[:rows],
        tables[rows:],
        starts,
        lens[rows:],
    )
    return Batch(*(a.astype(np.int32) for a in arrays)), sequences * pages + 1


def limit_us(name: str, rows: int, kind: str, keys: int, rate: float, flops: float) -> float | None:
    """The least time of one launch, at `rate` bytes and `flops` operations a microsecond."""
    if name.startswith("matmul_"):
        k, columns = map(int, name.removeprefix("matmul_").split("_")[0].split("x"))
        rows = keys if kind == "prefill" and columns < VOCAB else rows
        size = 2 * k * columns + 2 * rows * (k + columns)
        return max(size / rate, 2 * rows * k * columns / flops)
    if name.startswith("attention_decode"):
        return rows * keys * KV_HEADS * DIM * 4 / rate
    if name.startswith("attention_prefill"):
        return 2 * keys * keys * HEADS * DIM / flops
    tokens = keys if kind == "prefill" else rows
    if name.startswith("rms_norm"):
        return 4 * tokens * HIDDEN / rate
    if name.startswith("rope_cache"):
        return tokens * (4 * (HEADS + 2 * KV_HEADS) * DIM + 4 * DIM) / rate
    return None


def main(layers: int, backend: str, steps: list[tuple[str, int, int]]) -> None:
    assert jax.default_backend() == "gpu", "needs a Hopper GPU"
    rate, flops = ceilings()
    print(
        f"{jax.devices()[0].device_kind}, reading {rate / 1e6:.2f} TB/s, dot {flops / 1e6:.0f} TFLOP/s",
        flush=True,
    )
    model = random_model(
        QWEN3_8B | {"num_hidden_layers": layers},
        dtype=jnp.bfloat16,
        backend=backend,
        max_model_len=16384,
    )
    begin = time.time()
    tiles = prove(
        model, [Bucket(n, 0, 0) if kind == "decode" else Bucket(0, n * keys, n) for kind, n, keys in steps]
    )
    if backend == "xla":
        print(
            f"larger tiles, proven in {time.time() - begin:.1f} s: {described(tiles) or 'none'}", flush=True
        )
    graph, state = nnx.split(model)

    def step(state, cache, batch):
        model = nnx.merge(graph, state)
        hidden, cache = model(batch, cache)
        return model.logits(hidden.at[batch.last_rows()].get(mode="promise_in_bounds")), cache

    for (kind, sequences, length), allowed in itertools.product(steps, dict.fromkeys((BASE, tiles))):
        batch, pages = batch_of(kind, sequences, length)
        shape = pages, KV_HEADS, PAGE_SIZE, DIM
        cache = [tuple(normal(i, *shape) for i in (1, 2)) for _ in range(layers)]
        begin, batch = time.time(), jax.device_put(batch)
        jitted = jax.jit(
            with_tiles(allowed, step), donate_argnums=1, compiler_options=compiler_options(backend)
        )
        compiled = jitted.lower(state, cache, batch).compile()
        built = time.time() - begin

        def run(count, cache, batch=batch, compiled=compiled):
            for _ in range(count):
                _, cache = compiled(state, cache, batch)
            return jax.block_until_ready(cache)

        cache, count = run(3, cache), 20 if kind == "decode" else 3
        begin = time.time()
        cache = run(count, cache)
        wall = (time.time() - begin) / count * 1e6
        kernels = collections.defaultdict(list)
        for name, ms in cupti_times(functools.partial(run, count, cache)):
            kernels[name.removesuffix("_kernel").removesuffix("_mosaic_gpu")].append(ms * 1e3)
        del cache
        total = sum(map(sum, kernels.values())) / count
        sort = ("base tiles, " if allowed == BASE else "larger tiles, ") if backend == "xla" else ""
        print(f"\n{kind}, {sequences} × {length}, {layers} layers ({sort}compiled in {built:.1f} s)")
        print(f"{'kernel':44} {'launches':>8} {'µs each':>8} {'µs a step':>10} {'of limit':>8}")
        for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
            each = float(np.median(times))
            limit = limit_us(name, sequences, kind, length, rate, flops)
            reached = f"{limit / each:8.0%}" if limit else ""
            print(
                f"{name[:44]:44} {len(times) / count:8.1f} {each:8.2f} {sum(times) / count:10.1f} {reached}"
            )
        print(f"kernels {total:.0f} µs, wall {wall:.0f} µs, gaps {wall - total:.0f} µs", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", nargs="*", help="KIND,SEQUENCES,KEYS such as decode,64,200")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--backend", default="mosaic_gpu")
    options = parser.parse_args()
    chosen = [(kind, int(n), int(length)) for kind, n, length in (a.split(",") for a in options.steps)]
    main(options.layers, options.backend, chosen or list(STEPS))
