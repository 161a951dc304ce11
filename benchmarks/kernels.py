"""Times the Hopper kernels beside XLA's and torch's; needs a Hopper GPU.

    python benchmarks/kernels.py OUT [seconds] [section ...]

Medians of the kernels' own times (CUPTI), launch gaps left out; "wall" is host time with the gaps. Operands rotate so
that L2 cannot hold them. Writes OUT/kernels.json and OUT/kernels.png; sections stop when `seconds` are over, the points
that matter most come first. Run alone on the machine.
"""

import concurrent.futures
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the card

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import mosaic_gpu_sm90 as attention
from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import tile
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as rms_norm
from pallas_kernels.rope_cache import mosaic_gpu_sm90 as rope_cache
from pallas_kernels.rope_cache import xla as rope_cache_xla
from pallas_kernels.rope_cache.op import rope_table
from pallas_kernels.sample import mosaic_gpu_sm90 as sample
from pallas_kernels.sample import xla as sample_xla
from pallas_kernels.sample.op import token_logprobs

SHAPES = {
    "Qwen3-8B": {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 24576),
        "down": (12288, 4096),
        "head": (4096, 151936),
    },
    "Llama-3.2-1B": {
        "qkv": (2048, 3072),
        "o": (2048, 2048),
        "gate_up": (2048, 16384),
        "down": (8192, 2048),
        "head": (2048, 128256),
    },
    "Qwen3-32B": {
        "qkv": (5120, 10240),
        "o": (8192, 5120),
        "gate_up": (5120, 51200),
        "down": (25600, 5120),
        "head": (5120, 151936),
    },
}
ROWS = (8192, 1, 64, 256, 8, 1024, 2048, 128, 512, 16, 32, 2, 4, 96, 192)
MOST_HEAD_ROWS = 1024
CACHES = 3
"""In turn, so that L2 holds none of those that are larger than a third of it."""
DECODES = (  # (sequences, keys)
    (1, 200),
    (64, 200),
    (256, 130),
    (256, 200),
    (1000, 80),
    (1000, 200),
    (256, 1024),
    (64, 4096),
    (1, 8192),
    (1, 32768),
    (8, 8192),
)
DRAWS = {  # (temperature, top-k, top-p)
    "top-p": (0.8, 0, 0.9),
    "top-k 20, top-p 0.95": (0.8, 20, 0.95),
    "top-k 200": (0.8, 200, 1.0),
    "top-k 1000": (0.8, 1000, 1.0),
    "all of it": (0.8, 0, 1.0),
    "greedy": (0.0, 50, 0.9),
}
L2_BYTES = 60e6
HEADS, KV_HEADS, DIM, VOCAB = 32, 8, 128, 151936


def cupti_times(run: Callable[[], object]) -> list[tuple[str, float]]:
    """(name, milliseconds) of every kernel that `run` starts and waits for."""
    from jax._src.lib import mosaic_gpu  # only where there is a GPU

    cupti = mosaic_gpu._mosaic_gpu_ext
    cupti._cupti_init()
    run()
    return cupti._cupti_get_timings(True)


def kernel_times(f, operands, repeats: int) -> list[list[float]]:
    """Per round over `operands`, a list of argument tuples, the microseconds of every kernel of every call."""
    jax.block_until_ready([f(*arguments) for arguments in operands])

    def run():
        for _ in range(repeats):
            for arguments in operands:
                jax.block_until_ready(f(*arguments))

    times = [ms * 1e3 for _, ms in cupti_times(run)]
    kernels = len(times) // repeats
    if not kernels or len(times) != kernels * repeats:
        raise RuntimeError(f"{len(times)} kernels in {repeats} rounds")
    return [times[i * kernels : (i + 1) * kernels] for i in range(repeats)]


def gpu_us(f, operands, repeats: int) -> float:
    """Median over rounds of the GPU time of one call."""
    return float(np.median([sum(times) for times in kernel_times(f, operands, repeats)])) / len(operands)


def ceilings() -> tuple[float, float]:
    """Bytes a microsecond at which a large array is read, and operations of large bfloat16 products.

    The products run for more than a second and the later half counts: at full power the card lowers its clock within
    tenths of a second, and a step of many rows never sees the clock that a few products have.
    """
    big, square = normal(0, 2**14, 2**15), normal(0, 8192, 8192)
    rate = big.nbytes / gpu_us(jax.jit(functools.partial(jnp.max, axis=1)), [(big,)], 5)
    product = jax.jit(jnp.dot)
    wall_us(product, (square, square), 400)
    return rate, 2 * 8192**3 / wall_us(product, (square, square), 400)


def wall_us(f, arguments, repeats: int) -> float:
    """Host time of a call in a row of calls."""
    jax.block_until_ready(f(*arguments))
    start = time.perf_counter()
    out = None
    for _ in range(repeats):
        out = f(*arguments)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats * 1e6


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _drawn(key, shape, scale, dtype):
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype)


def normal(seed: int, *shape, scale=1.0, dtype=jnp.bfloat16):
    return _drawn(jax.random.key(seed), shape, scale, dtype)


def copy():
    x = normal(0, 2**29)
    us = gpu_us(jax.jit(lambda x: -x), [(x,)], 5)
    yield {"op": "copy", "GB": 2 * x.nbytes / 1e9, "us": us, "TB/s": 2 * x.nbytes / us / 1e6}


def weight_copies(k: int, n: int) -> int:
    """How many weights in turn L2 cannot hold."""
    return int(2 * L2_BYTES // (k * n * 2)) + 1


def points_of(model: str, rows=ROWS) -> list[tuple[int, str]]:
    """(rows, name) of a model's products, without the head's largest."""
    return [(m, name) for m in rows for name in SHAPES[model] if name != "head" or m <= MOST_HEAD_ROWS]


def products(model: str):
    """Ours beside `jnp.dot` for weights as [K, N] and as [N, K]; everything is compiled before anything is timed."""

    def programs(m, name):
        k, n = SHAPES[model][name]
        x, w, turned = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((m, k), (k, n), (n, k)))
        packed = jax.ShapeDtypeStruct((-(-k // 64), n, 64), jnp.bfloat16)
        ours = functools.partial(matmul.matmul, n=n)
        across = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())))
        pairs = ((ours, packed), (jnp.dot, w), (across, turned))
        return [jax.jit(call).lower(x, operand).compile() for call, operand in pairs]

    points = points_of(model)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        ready = dict(zip(points, threads.map(lambda point: programs(*point), points), strict=True))
    weights = {}
    for name, (k, n) in SHAPES[model].items():
        ws = [normal(i, k, n, scale=0.02) for i in range(weight_copies(k, n))]
        weights[name] = [jax.jit(matmul.pack)(w) for w in ws], ws, [jnp.asarray(w.T) for w in ws]
    for m, name in points:
        k, n = SHAPES[model][name]
        xs = [normal(9 + i, m, k) for i in range(weight_copies(k, n))]
        repeats = 7 if m <= 1024 else 3
        ours, plain, transposed = (
            gpu_us(program, list(zip(xs, operand, strict=True)), repeats)
            for program, operand in zip(ready[m, name], weights[name], strict=True)
        )
        yield {
            "op": "matmul",
            "model": model,
            "shape": name,
            "M": m,
            "us": ours,
            "dot us": plain,
            "dot, transposed us": transposed,
            "ratio": min(plain, transposed) / ours,
            "TFLOP/s": 2 * m * n * k / ours / 1e6,
            "TB/s": k * n * 2 / ours / 1e6,
            "tile": str(tile(m, k, n, matmul.column_unit())),
        }


def _torch_us(run, repeats: int) -> float:
    """Median of what torch's work takes by CUDA events, launch included."""
    import torch

    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(np.median(times))


def recipe(model: str):
    """The public batch-invariant Triton kernel on the same shapes, as a CUDA graph over weights in turn."""
    import torch
    from triton_matmul import matmul as triton_matmul

    for m, name in points_of(model):
        k, n = SHAPES[model][name]
        x, *ws = (
            torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.1
            for shape in [(m, k)] + [(n, k)] * weight_copies(k, n)
        )
        out = triton_matmul(x, ws[0])
        exact = x.float() @ ws[0].float().T
        error = float((out.float() - exact).norm() / exact.norm())
        assert error < 3e-3, error
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [triton_matmul(x, w) for w in ws]
        graph.replay()
        us = _torch_us(graph.replay, 7) / len(ws)
        yield {"op": "triton", "model": model, "shape": name, "M": m, "us": us}
        del x, ws, out, exact, graph, kept


def _pages(count: int, head_dim: int = DIM):
    shape = count, KV_HEADS, 128, head_dim
    return normal(1, *shape), normal(2, *shape)


def decode():
    for batch, length in DECODES:
        pages = -(-length // 128)
        tables = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages) + 1
        q, tables = normal(0, batch, HEADS, DIM), jnp.asarray(tables, jnp.int32)
        sizes = jnp.arange(batch + 1, dtype=jnp.int32), jnp.full(batch, length, jnp.int32)
        operands = [(q, *_pages(batch * pages + 1), tables, *sizes) for _ in range(CACHES)]
        options = {"scale": DIM**-0.5, "window": None, "soft_cap": None, "max_query_len": 1}
        call = jax.jit(functools.partial(attention.attention, **options))
        # The kernel is the longest; the rest builds the work list, once a step for all layers.
        rounds = [sorted(times, reverse=True) for times in kernel_times(call, operands, 15)]
        parts = slice(0, CACHES), slice(CACHES, None)
        ours, lists = ([sum(times[part]) / CACHES for times in rounds] for part in parts)
        us, size = float(np.median(ours)), batch * length * KV_HEADS * DIM * 4
        row = {"op": "decode", "batch": batch, "keys": length, "us": us, "TB/s": size / us / 1e6}
        yield row | {
            "work list us": float(np.median(lists)),
            "work list kernels": len(rounds[0]) // CACHES - 1,
        }


def prefill():
    for length, head_dim in ((2048, 128), (8192, 128), (32768, 128), (8192, 64), (8192, 256)):
        pages = length // 128
        arguments = (
            normal(0, length, HEADS, head_dim),
            *_pages(pages + 1, head_dim),
            jnp.asarray(np.random.default_rng(0).permutation(pages)[None] + 1, jnp.int32),
            jnp.array([0, length], jnp.int32),
            jnp.array([length], jnp.int32),
        )
        options = {"scale": head_dim**-0.5, "window": None, "soft_cap": None, "max_query_len": length}
        us = gpu_us(jax.jit(functools.partial(attention.attention, **options)), [arguments], 5)
        q, k, v = (normal(i, 1, length, h, head_dim) for i, h in enumerate((HEADS, KV_HEADS, KV_HEADS)))
        dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        row = {"op": "prefill", "keys": length, "head_dim": head_dim, "us": us}
        row["TFLOP/s"] = 2 * length**2 * HEADS * head_dim / us / 1e6
        if head_dim <= 128:
            row["cuDNN us"] = gpu_us(jax.jit(dense), [(q, k, v)], 5)
            row["ratio"] = row["cuDNN us"] / us
        yield row


def torch_attention():
    """torch's scaled_dot_product_attention; with 32 KV heads it reads more keys, but every backend takes that."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for length, kv_heads in itertools.product((2048, 8192, 32768), (KV_HEADS, HEADS)):
        q, k, v = (
            torch.randn(1, heads, length, DIM, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS, kv_heads, kv_heads)
        )
        attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=True,
            enable_gqa=kv_heads < HEADS,
        )
        row = {"op": "torch sdpa", "KV heads": kv_heads, "keys": length}
        for name, backend in (
            ("cuDNN us", SDPBackend.CUDNN_ATTENTION),
            ("Flash us", SDPBackend.FLASH_ATTENTION),
        ):
            with sdpa_kernel(backend):
                try:
                    attend(q, k, v)
                except RuntimeError:  # this backend doesn't group heads
                    continue
                row[name] = _torch_us(functools.partial(attend, q, k, v), 5)
        yield row


def norms():
    size = 4096
    for rows in (1, 64, 1024, 8192):
        copies = min(8, int(2 * L2_BYTES // (rows * size * 2)) + 1)
        weight = normal(3, size, dtype=jnp.float32)
        operands = [(normal(i, rows, size), weight) for i in range(copies)]

        def plain(x, weight):
            wide = x.astype(jnp.float32)
            mean = jnp.mean(wide * wide, axis=1, keepdims=True)
            return (wide * jax.lax.rsqrt(mean + 1e-6) * weight).astype(x.dtype)

        us = gpu_us(jax.jit(functools.partial(rms_norm.rms_norm, eps=1e-6)), operands, 15)
        row = {"op": "rms_norm", "rows": rows, "us": us, "XLA us": gpu_us(jax.jit(plain), operands, 15)}
        yield row | {"TB/s": 4 * rows * size / us / 1e6}


def rope():
    table = jnp.asarray(rope_table(1e6 ** (-2 * np.arange(DIM // 2) / DIM), 40960))
    norm = normal(3, DIM, dtype=jnp.float32)
    for tokens in (1, 64, 256, 2048, 8192):
        rng = np.random.default_rng(0)
        pages = tokens // 128 + 2
        qkv = normal(0, tokens, (HEADS + 2 * KV_HEADS) * DIM)
        positions = jnp.asarray(rng.integers(0, 40960, tokens), jnp.int32)
        slots = jnp.asarray(rng.permutation(pages * 128)[:tokens], jnp.int32)
        row = {"op": "rope_cache", "tokens": tokens}
        for name, op in (("us", rope_cache), ("XLA us", rope_cache_xla)):
            call = functools.partial(op.rope_cache, num_q_heads=HEADS, num_kv_heads=KV_HEADS, eps=1e-6)
            call = jax.jit(functools.partial(call, q_norm=norm, k_norm=norm), donate_argnums=(1, 2))
            cache = list(_pages(pages))

            def step(qkv, *where, call=call, cache=cache):
                q, *cache[:] = call(qkv, *cache, *where)
                return q

            rounds = kernel_times(step, [(qkv, table, positions, slots)], 11)
            row[name] = float(np.median([sum(times) for times in rounds]))
            row[name.replace("us", "launches")] = len(rounds[0])
        size = tokens * (2 * (HEADS + 2 * KV_HEADS) * DIM * 2 + DIM * 4)
        yield row | {"TB/s": size / row["us"] / 1e6}


def draws():
    from bits import sampling_rows

    ours, theirs = jax.jit(sample.sample), jax.jit(sample_xla.sample)
    for batch in (1, 64, 256):
        logits = normal(0, batch, VOCAB, scale=3.0, dtype=jnp.float32)
        reading = gpu_us(jax.jit(lambda x: jnp.max(x, axis=1)), [(logits,)], 5)
        for kind, (temperature, top_k, top_p) in DRAWS.items():
            over = {"temperature": jnp.full(batch, temperature), "top_k": jnp.full(batch, top_k, jnp.int32)}
            over |= {"top_p": jnp.full(batch, top_p), "min_p": jnp.zeros(batch)}
            arguments = logits, sampling_rows(batch, **over)
            row = {"op": "sample", "batch": batch, "kind": kind, "reading us": reading}
            row |= {"us": gpu_us(ours, [arguments], 5), "wall us": wall_us(ours, arguments, 10)}
            if kind == "top-p" or batch == 256:
                row["XLA wall us"] = wall_us(theirs, arguments, 2)
            yield row


def logprobs():
    """A trainer's, forward and with the gradient by the logits; of nothing else that `token_logprobs` returns."""
    plain = lambda x, ids: jnp.take_along_axis(jax.nn.log_softmax(x), ids[:, None], axis=1)[:, 0]  # noqa: E731
    ways = {"us": "mosaic_gpu", "XLA us": "xla", "log_softmax us": None}

    def value(x, ids, backend):
        return token_logprobs(x, ids, top=1, backend=backend)[0] if backend else plain(x, ids)

    def trained(x, ids, d, backend):
        found, pull = jax.vjp(lambda x: value(x, ids, backend), x)
        return found, pull(d)[0]

    for rows in (512, 2048, 8192):
        logits = normal(0, rows, VOCAB, scale=3.0, dtype=jnp.float32)
        ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, rows), jnp.int32)
        d = normal(1, rows, dtype=jnp.float32)
        for op, f, arguments, accesses in (
            ("logprobs", value, (logits, ids), 1),
            ("logprobs and gradient", trained, (logits, ids, d), 3),
        ):
            row: dict = {"op": op, "rows": rows}
            for name, backend in ways.items():
                times = kernel_times(jax.jit(functools.partial(f, backend=backend)), [arguments], 5)
                row[name] = float(np.median([sum(each) for each in times]))
                row[name.replace("us", "launches")] = len(times[0])
            yield row | {"TB/s": 4 * accesses * logits.size / row["us"] / 1e6}


SECTIONS = {
    "copy": copy,
    "rope": rope,
    "norms": norms,
    "decode": decode,
    "draws": draws,
    "logprobs": logprobs,
    "prefill": prefill,
    "torch": torch_attention,
    **{f"products {model}": functools.partial(products, model) for model in SHAPES},
    **{f"triton {model}": functools.partial(recipe, model) for model in SHAPES},
}


def speeds(rows):
    """(label, speed with the baseline's as 1) of every row that has a baseline."""
    for row in rows:
        match row.get("op"):
            case "rope_cache":
                yield f"q/k norm, RoPE, cache write, {row['tokens']} tokens / XLA", row["XLA us"] / row["us"]
            case "rms_norm":
                yield f"RMSNorm, {row['rows']} rows / XLA", row["XLA us"] / row["us"]
            case "sample" if "XLA wall us" in row:
                label = f"sampling, {row['kind']}, batch {row['batch']} / XLA"
                yield label, row["XLA wall us"] / row["wall us"]
            case "logprobs" | "logprobs and gradient":
                label = f"{row['op']}, {row['rows']} rows / jax.nn.log_softmax"
                yield label, row["log_softmax us"] / row["us"]
            case "prefill" if "ratio" in row:
                yield f"prefill, {row['keys']} keys of {row['head_dim']} / cuDNN", row["ratio"]


def plot(rows, path) -> None:
    """A bar for every row of `speeds`, and for every model its products' speeds by row count."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    bars = list(speeds(rows))[::-1]
    products = [row for row in rows if row.get("op") == "matmul"]
    models = [model for model in SHAPES if any(row["model"] == model for row in products)]
    heights = ([0.24 * len(bars) + 1] if bars else []) + [4] * len(models)
    figure, axes = plt.subplots(
        len(heights), figsize=(9, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    axes = list(axes[:, 0])
    if bars:
        bar = axes.pop(0)
        bar.barh(*zip(*bars, strict=True))
        bar.axvline(1, color="black", linewidth=1)
        bar.set(xscale="log", xlabel="speed, baseline = 1")
        bar.margins(y=0.01)
    for model, axis in zip(models, axes, strict=True):
        for name in SHAPES[model]:
            points = sorted(
                (r["M"], r["ratio"]) for r in products if (r["model"], r["shape"]) == (model, name)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(xscale="log", xlabel="rows", ylabel="speed, better jnp.dot = 1", title=f"matmul, {model}")
        axis.legend()
    figure.suptitle(rows[0]["device"])
    figure.savefig(path, dpi=120)


def run_sections(sections, names, seconds: float, path: pathlib.Path) -> tuple[list[dict], int]:
    """Rows of all sections, as they are printed and written to `path`, and how many sections failed.

    Args:
        sections: by name, what yields their rows.
        names: which of them; none means all.
        seconds: after these a section ends with the row that it is at.
    """
    start, failed = time.time(), 0
    assert jax.default_backend() == "gpu", "benchmarks need a GPU"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    rows = [{"device": jax.devices()[0].device_kind, "date": time.strftime("%Y-%m-%d")} | versions]
    print(json.dumps(rows[0]), flush=True)
    for name in names or sections:
        try:
            section = sections[name]()
            for row in section:
                rows.append(row)
                shown = {a: float(f"{b:.4g}") if isinstance(b, float) else b for a, b in row.items()}
                print(json.dumps(shown, ensure_ascii=False), flush=True)
                path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
                if time.time() - start > seconds:
                    section.close()
                    break
        except Exception as problem:  # a failed section must not cost the others their turn
            failed += 1
            print(json.dumps({"section": name, "failed": f"{problem!r:.800}"}), flush=True)
        print(json.dumps({"section": name, "s": round(time.time() - start, 1)}), flush=True)
    return rows, failed


def main(out: pathlib.Path, seconds: float, names) -> None:
    rows, _ = run_sections(SECTIONS, names, seconds, out / "kernels.json")
    if any("ratio" in row for row in rows) or list(speeds(rows)):
        plot(rows, out / "kernels.png")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 600.0, sys.argv[3:])
