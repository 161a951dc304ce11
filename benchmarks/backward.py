"""Times the Hopper gradient kernels beside plain JAX's autodiff and compares their bits; needs a Hopper GPU.

    python benchmarks/backward.py OUT [seconds] [section ...]

Qwen3-8B's shapes in bfloat16; medians of the kernels' own times (CUPTI), launch gaps left out. Plain JAX is `jnp.dot`
and `jax.nn.dot_product_attention` (cuDNN). "accumulated" adds to a float32 sum, as training over micro-batches does;
the other plain dw is rounded to bfloat16. Writes OUT/backward.json; sections stop when `seconds` are over. Exits 1 if
bits differ that must not. Run alone on the machine.
"""

import functools
import os
import pathlib
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from kernels import DIM, HEADS, KV_HEADS, SHAPES, gpu_us, kernel_times, normal, run_sections

from pallas_kernels.arrays import round_up
from pallas_kernels.attention import backward_sm90 as attention_backward
from pallas_kernels.attention import mosaic_gpu_sm90 as attention_forward
from pallas_kernels.attention.op import attention
from pallas_kernels.gradient import Trained
from pallas_kernels.matmul import backward_sm90 as backward
from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.activation_sm90 import before_activation
from pallas_kernels.matmul.backward_sm90 import Tile
from pallas_kernels.matmul.op import gated_matmul
from pallas_kernels.numerics import GRADIENT_ROWS
from pallas_kernels.rms_norm.backward_sm90 import rms_norm as norm_gradient

PRODUCTS = {name: SHAPES["Qwen3-8B"][name] for name in ("qkv", "o", "gate_up", "down")}
ROWS = (8192, 1024, 2048, 64)
TILES = [
    Tile(groups, wide, band)
    for groups, wide in ((2, 256), (2, 192), (2, 128), (3, 128))
    for band in (4, 8, 16)
]
TILES += [Tile(prefetch=every) for every in (0, 2, 8)]
LENGTHS = ((1, 2048), (1, 8192), (16, 512), (64, 128))
"""(sequences, tokens each) of one micro-batch."""


def in_place(f):
    """`f(sum, *arguments) -> (sum, …)`, which goes on from the sum that it left."""
    call, held = jax.jit(f, donate_argnums=0), []

    def step(start, *arguments):
        held[:] = call(held[0] if held else jax.tree.map(jnp.array, start), *arguments)
        return tuple(held)

    return step


def timed(f, *arguments, repeats=7):
    """(microseconds, kernels) of a call."""
    rounds = kernel_times(f, [arguments], repeats)
    return float(np.median([sum(times) for times in rounds])), len(rounds[0])


def products():
    for rows in ROWS:
        for name, (k, n) in PRODUCTS.items():
            x, dy, w = normal(0, rows, k), normal(1, rows, n), normal(2, k, n, scale=0.02)
            packed, flops = jax.jit(matmul.pack)(w), 2 * rows * n * k
            total = jnp.zeros(packed.shape, jnp.float32)
            us, kernels = timed(in_place(lambda *a: (backward.weight_gradient(*a),)), total, x, dy)
            row = {"op": "dw", "shape": name, "M": rows, "us": us, "kernels": kernels}

            def wide(sum, x, dy):
                return (sum + jnp.einsum("mk,mn->kn", x, dy, preferred_element_type=jnp.float32),)

            row["plain us"], _ = timed(jax.jit(lambda x, w, dy: jax.vjp(jnp.dot, x, w)[1](dy)[1]), x, w, dy)
            row["plain, accumulated us"], _ = timed(in_place(wide), jnp.zeros((k, n), jnp.float32), x, dy)
            row |= {"ratio": row["plain, accumulated us"] / us, "TFLOP/s": flops / us / 1e6}
            yield row | {"TB/s": (8 * k * n + 2 * rows * (k + n)) / us / 1e6}

            us, kernels = timed(jax.jit(functools.partial(backward.input_gradient, k=k)), dy, packed)
            plain, _ = timed(jax.jit(lambda x, w, dy: jax.vjp(jnp.dot, x, w)[1](dy)[0]), x, w, dy)
            row = {"op": "dx", "shape": name, "M": rows, "us": us, "kernels": kernels, "plain us": plain}
            yield row | {"ratio": plain / us, "TFLOP/s": flops / us / 1e6}


def gated():
    """Forward and backward of an MLP's first half, the gradients added to a float32 sum; and what it consists of."""
    k, n = PRODUCTS["gate_up"][0], PRODUCTS["gate_up"][1] // 2
    gate, up = normal(2, k, n, scale=0.02), normal(3, k, n, scale=0.02)
    packed = jax.jit(matmul.pack_gated)(gate, up)
    for rows in ROWS:
        x, dy = normal(0, rows, k), normal(1, rows, n)

        def ours(total, x, packed, dy):
            def f(x, gradient):
                trained = Trained(packed, gradient)
                return gated_matmul(x, trained, n=n, activation="silu", backend="mosaic_gpu")

            y, pull = jax.vjp(f, x, total)
            dx, total = pull(dy)
            return total, dx, y

        def plain(total, x, gate, up, dy):
            f = lambda x, g, u: jax.nn.silu(jnp.dot(x, g)) * jnp.dot(x, u)  # noqa: E731
            y, pull = jax.vjp(f, x, gate, up)
            dx, *sums = pull(dy)
            return tuple(t + s for t, s in zip(total, sums, strict=True)), dx, y

        us, kernels = timed(in_place(ours), jnp.zeros(packed.shape, jnp.float32), x, packed, dy)
        zeros = jnp.zeros((k, n), jnp.float32)
        other, _ = timed(in_place(plain), (zeros, zeros), x, gate, up, dy)
        row = {
            "op": "gated, forward and backward",
            "M": rows,
            "us": us,
            "kernels": kernels,
            "plain us": other,
        }
        yield row | {"ratio": other / us, "TFLOP/s": 6 * rows * k * 2 * n / us / 1e6}

        options = {"n": n, "activation": "silu"}
        row = {"op": "gated, forward", "M": rows}
        row["us"], _ = timed(jax.jit(functools.partial(matmul.gated_matmul, **options)), x, packed)
        saving = jax.jit(functools.partial(matmul.gated_matmul_saving, **options))
        row["saving us"], _ = timed(saving, x, packed)
        yield row
        inner, through = saving(x, packed)[1], jax.jit(before_activation, static_argnames="activation")
        for activation in ("silu", "gelu_tanh"):
            row = {"op": "activation, backward", "activation": activation, "M": rows}
            row["us"], _ = timed(functools.partial(through, activation=activation), inner, dy)
            yield row | {"TB/s": 10 * rows * n / row["us"] / 1e6}


def tiles():
    for rows in (8192, 1024):
        for name, (k, n) in PRODUCTS.items():
            x, dy = normal(0, rows, k), normal(1, rows, n)
            packed = normal(2, k // 64, n, 64, scale=0.02)
            total = jnp.zeros(packed.shape, jnp.float32)
            for tile in TILES:
                dw = in_place(lambda *a, tile=tile: (backward.weight_gradient(*a, tile=tile),))
                dx = jax.jit(functools.partial(backward.input_gradient, k=k, tile=tile))
                row = {"op": "tile", "shape": name, "M": rows, "tile": str(tile)}
                row["dw us"], _ = timed(dw, total, x, dy, repeats=5)
                row["dx us"], _ = timed(dx, dy, packed, repeats=5)
                yield row


def _sequences(count: int, length: int, dim: int = DIM, seed: int = 0):
    """(q, k_pages, v_pages, tables, starts, lens, d_out) of `count` sequences on shuffled pages."""
    pages, tokens = -(-length // 128), count * length
    tables = np.random.default_rng(seed).permutation(count * pages).reshape(count, pages) + 1
    pools = (normal(seed + i, count * pages + 1, KV_HEADS, 128, dim) for i in (1, 2))
    indices = tables, np.arange(count + 1) * length, np.full(count, length)
    indices = (jnp.asarray(x, jnp.int32) for x in indices)
    return normal(seed, tokens, HEADS, dim), *pools, *indices, normal(seed + 3, tokens, HEADS, dim)


def attentions():
    for dim in (128, 64, 256):
        for count, length in LENGTHS:
            arguments = _sequences(count, length, dim)
            options = {"scale": dim**-0.5, "window": None, "soft_cap": None}
            aligned = {"query_alignment": GRADIENT_ROWS}
            *operands, d_out = arguments

            def saving(*operands, options=options, aligned=aligned):
                tiles = attention_forward.batch_tiles(*operands, window=None, **aligned)
                return attention_forward.attention_saving(*operands, **options, tiles=tiles)[1]

            saved = jax.jit(saving)(*operands)
            call = jax.jit(functools.partial(attention_backward.attention, **options))
            rounds = kernel_times(call, [(*operands, saved, d_out)], 5)
            row = {"op": "attention", "sequences": count, "tokens": length, "head_dim": dim}
            row |= {
                "backward us": float(np.median([sum(times) for times in rounds])),
                "kernels": len(rounds[0]),
            }
            row["longest kernels us"] = [float(x) for x in np.sort(np.median(rounds, axis=0))[::-1][:4]]

            def ours(q, k, v, *rest, options=options | aligned | {"max_query_len": length}):
                def f(q, k, v):
                    return attention(q, k, v, *rest[:3], backend="mosaic_gpu", **options)

                out, pull = jax.vjp(f, q, k, v)
                return out, pull(rest[3])

            row["us"] = gpu_us(jax.jit(ours), [arguments], 5)
            if dim <= 128:
                q, d_out = (normal(i, count, length, HEADS, dim) for i in (0, 3))
                k, v = (normal(i, count, length, KV_HEADS, dim) for i in (1, 2))
                dense = functools.partial(
                    jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
                )

                def plain(q, k, v, d_out, dense=dense):
                    out, pull = jax.vjp(dense, q, k, v)
                    return out, pull(d_out)

                row["plain us"] = gpu_us(jax.jit(plain), [(q, k, v, d_out)], 5)
                row["ratio"] = row["plain us"] / row["us"]
            yield row | {"TFLOP/s": 7 * count * length**2 * HEADS * dim / row["us"] / 1e6}


def differing(got, want) -> tuple[int, int]:
    """(values that differ, values compared); bits, not numbers."""
    pairs = [[np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (got, want)]
    unequal = sum(
        int((a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")).sum()) for a, b in zip(*pairs, strict=True)
    )
    return unequal, sum(x.size for x in pairs[0])


def bits():
    """Every way to cut or to tile against one; "control" rows must differ."""
    k, n, rows = 4096, 6144, 2048
    x, dy, w = normal(0, rows, k), normal(1, rows, n), jax.jit(matmul.pack)(normal(2, k, n, scale=0.02))
    dw = jax.jit(backward.weight_gradient, static_argnames="tile")
    dx = jax.jit(backward.input_gradient, static_argnames=("k", "tile"))
    start = normal(3, *w.shape, dtype=jnp.float32)
    whole, through = dw(start, x, dy), dx(dy, w, k)
    exact = start + matmul.pack(
        jnp.einsum("mk,mn->kn", x, dy, precision="highest", preferred_element_type=jnp.float32)
    )
    yield {
        "op": "dw",
        "relative error": float(jnp.linalg.norm(whole - exact) / jnp.linalg.norm(exact - start)),
    }
    exact = jnp.einsum(
        "mn,kn->mk", dy, matmul.unpack(w, k, n), precision="highest", preferred_element_type=jnp.float32
    )
    plain = jnp.einsum("mn,kn->mk", dy, matmul.unpack(w, k, n))
    errors = (float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) for y in (through, plain))
    yield {"op": "dx"} | dict(zip(("relative error", "plain"), errors, strict=True))

    def cut(*cuts):
        total = start
        for first, last in zip((0, *cuts), (*cuts, rows), strict=True):
            total = dw(total, x[first:last], dy[first:last])
        return total

    def compare(op, got, want, control=False):
        differ, compared = differing(got, want)
        return {"op": op, "compared": compared, "differ": differ} | ({"control": True} if control else {})

    for cuts in ((64,), (1024,), (64, 192, 1152), tuple(range(64, rows, 64))):
        yield compare(f"dw, {len(cuts) + 1} micro-batches", cut(*cuts), whole)
    turned = np.r_[64:rows, 0:64]
    yield compare("dw, rows in another order", dw(start, x[turned], dy[turned]), whole, control=True)
    dead = jnp.arange(rows) // 64 % 7 == 3
    still = jnp.where(dead[:, None], 0, dy)
    poisoned = jnp.where(dead[:, None], jnp.nan, x)
    yield compare("dw, chunks without a gradient NaN", dw(start, poisoned, still), dw(start, x, still))
    yield compare("dw, no gradient at all", dw(start, poisoned, jnp.zeros_like(dy)), start)
    seen = dw(start, x.at[3].set(jnp.nan), still)
    yield compare("dw, a row with a gradient NaN", seen, dw(start, x, still), control=True)
    for tile in TILES:
        yield compare(f"dw, {tile}", dw(start, x, dy, tile=tile), whole)
        yield compare(f"dx, {tile}", dx(dy, w, k, tile=tile), through)
    for some in (1, 64, 130, 1000):
        yield compare(f"dx, {some} rows", dx(dy[:some], w, k), through[:some])
    yield from _gated_bits(x, compare)
    yield from _norm_bits(compare)
    for dim in (64, 96, 128, 256):
        for option in ({}, {"window": 200}, {"soft_cap": 30.0}):
            yield from _attention_bits(
                dim, {"scale": dim**-0.5, "window": None, "soft_cap": None} | option, compare
            )


def _norm_bits(compare):
    """RMSNorm's gradient: hidden states, and query heads of which 32 belong together."""
    for rows, size, each in ((2048, 4096, 1), (1024 * 32, 128, 32)):
        x, dy = normal(0, rows, size), normal(1, rows, size)
        weight, start = 1 + normal(2, size, dtype=jnp.float32), normal(3, size, dtype=jnp.float32)
        call, what = jax.jit(functools.partial(norm_gradient, eps=1e-6, each=each)), f"norm of {size}"
        whole, total = call(x, weight, start, dy), start
        for first in range(0, rows, 256 * each):
            here = slice(first, first + 256 * each)
            part, total = call(x[here], weight, total, dy[here])
            yield compare(f"{what}, rows from {first}", part, whole[0][here])
        yield compare(f"{what}, sums of cuts", total, whole[1])
        yield compare(f"{what}, other rows", call(x[::-1], weight, start, dy[::-1]), whole, control=True)
        dead = jnp.arange(rows)[:, None] % 3 == 1
        still = jnp.where(dead, 0, dy)
        clean, hit = (call(jnp.where(dead, bad, x), weight, start, still) for bad in (1, jnp.nan))
        yield compare(f"{what}, NaN in rows without a gradient", hit, clean)


def _gated_bits(x, compare):
    """The forward that saves beside the one that doesn't, and the activation's gradient of a row anywhere."""
    rows, k = x.shape
    n = PRODUCTS["gate_up"][1] // 2
    packed, dy = normal(4, k // 64, 2 * n, 64, scale=0.02), normal(5, rows, n)
    for activation, act in (("silu", jax.nn.silu), ("gelu_tanh", jax.nn.gelu)):
        options = {"n": n, "activation": activation}
        saving = jax.jit(functools.partial(matmul.gated_matmul_saving, **options))
        through = jax.jit(functools.partial(before_activation, activation=activation))
        for some in (rows, 1000, 130, 64, 1):
            y, inner = saving(x[:some], packed)
            plain = matmul.gated_matmul(x[:some], packed, **options)
            yield compare(f"{activation}, {some} rows, the result", y, plain)
            product = matmul.matmul(x[:some], packed, n=2 * n)
            yield compare(f"{activation}, {some} rows, saved", inner, product)
        inner = saving(x, packed)[1]
        d_inner = through(inner, dy)
        for first, last in ((0, 64), (1024, 1216)):
            part = through(inner[first:last], dy[first:last])
            yield compare(f"{activation} backward, rows {first} to {last}", part, d_inner[first:last])
        yield compare(f"{activation} backward, other rows", part, d_inner[: last - first], control=True)

        def plain(inner, dy, act=act):
            f = lambda x: act(x[:, :, 0]) * x[:, :, 1]  # noqa: E731
            pairs, dy = inner.astype(jnp.float32).reshape(rows, -1, 2, 32), dy.astype(jnp.float32)
            return jax.vjp(f, pairs)[1](dy.reshape(rows, -1, 32))[0].reshape(inner.shape)

        exact = jax.jit(plain)(inner, dy)
        error = float(jnp.linalg.norm(d_inner - exact) / jnp.linalg.norm(exact))
        yield {"op": f"{activation} backward", "relative error": error}


def _attention_bits(dim, options, compare, count=3, length=700):
    """Sequences side by side and alone, before rows of NaN that are none's; results kept for a gradient or not."""

    @functools.partial(jax.jit, static_argnames="aligned")
    def call(q, k, v, tables, starts, lens, d_out, aligned=1):
        fill = lambda x: jnp.pad(x, ((0, 100), (0, 0), (0, 0)), constant_values=jnp.nan)  # noqa: E731
        operands, window = (fill(q), k, v, tables, starts, lens), options["window"]
        tiles = attention_forward.batch_tiles(*operands, window=window, query_alignment=aligned)
        out, saved = attention_forward.attention_saving(*operands, **options, tiles=tiles)
        plain = attention_forward.attention(*operands, **options, max_query_len=length, tiles=tiles)
        dq, dk, dv = attention_backward.attention(*operands, saved, fill(d_out), **options)
        return dq, dk, dv, out, plain

    q, k, v, tables, starts, lens, d_out = _sequences(count, length, dim)
    packed = call(q, k, v, tables, starts, lens, d_out)
    what = f"attention {dim}, {options}"
    for s in range(count):
        rows, pages = np.s_[s * length : (s + 1) * length], np.asarray(tables[s])

        def mine(dq, dk, dv, out, plain, begin, pages=pages):
            rows = np.s_[begin : begin + length]
            return dq[rows], dk[pages], dv[pages], out[rows], plain[rows]

        alone = call(q[rows], k, v, tables[s : s + 1], starts[:2], lens[:1], d_out[rows])
        got, want = mine(*alone, begin=0), mine(*packed, begin=s * length)
        yield compare(f"{what}, sequence {s} alone", got, want)
        for dq, *_, out, plain in (alone, packed) if s == 0 else (alone,):
            here = f"{what}, {out.shape[0]} rows"
            yield compare(f"{here}, kept", out, plain)
            none = [x[-100:] for x in (dq, out)]
            yield compare(f"{here}, of no sequence", none, [jnp.zeros_like(x) for x in none])
    # Every sequence but the last filled up with rows after its own, whose gradient is zero.
    place = np.arange(count * length) + np.arange(count * length) // length * (-length % GRADIENT_ROWS)
    wide, x_d_out = (jnp.zeros((place[-1] + 1, *x.shape[1:]), x.dtype).at[place].set(x) for x in (q, d_out))
    starts = jnp.minimum(starts // length * round_up(length, GRADIENT_ROWS), place[-1] + 1)
    dq, dk, dv, out, plain = call(
        wide, k, v, tables, starts, starts[1:] - starts[:-1], x_d_out, aligned=GRADIENT_ROWS
    )
    rows = np.s_[: count * length]
    want = packed[0][rows], *packed[1:3], packed[3][rows], packed[4][rows]
    yield compare(f"{what}, aligned", (dq[place], dk, dv, out[place], plain[place]), want)
    none = [x[-100:] for x in (dq, out, plain)]
    yield compare(f"{what}, aligned, of no sequence", none, [jnp.zeros_like(x) for x in none])
    other = np.asarray(tables[1]), np.asarray(tables[0])
    yield compare(f"{what}, another sequence", *(packed[1][pages] for pages in other), control=True)


SECTIONS = {"bits": bits, "products": products, "gated": gated, "attentions": attentions, "tiles": tiles}


def main(out: pathlib.Path, seconds: float, names) -> int:
    rows, failed = run_sections(SECTIONS, names, seconds, out / "backward.json")
    wrong = [row for row in rows if "differ" in row and (row["differ"] > 0) != row.get("control", False)]
    return int(failed > 0 or bool(wrong))


if __name__ == "__main__":
    limit = float(sys.argv[2]) if len(sys.argv) > 2 else 540.0
    sys.exit(main(pathlib.Path(sys.argv[1]), limit, sys.argv[3:]))
