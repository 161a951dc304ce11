"""Every program that an engine compiles, compiled for GPUs that are not here: the lint reads what XLA makes of it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from engine_programs import compile_programs
from gpu_chips import compile_for, needs_plugin

from jaxdet.engine.buckets import Bucket, Buckets
from jaxdet.engine.engine import Engine
from jaxdet.engine.larger_tiles import trials
from jaxdet.testing import COMMON, FAMILIES, random_model
from jaxdet.verify.hlo import dots, lint_step
from pallas_kernels.attention.op import attention
from pallas_kernels.matmul import mosaic_gpu_sm90 as sm90
from pallas_kernels.matmul.op import gated_matmul, matmul
from pallas_kernels.matmul.tuning_sm90 import Tile
from pallas_kernels.proven import BASE, Tiles
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache
from pallas_kernels.sample.op import token_logprobs

pytestmark = [pytest.mark.slow, needs_plugin]

SHAPE = {"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"head_dim": 64, "vocab_size": 259}

BUCKETS = [Bucket(1, 0, 0), Bucket(256, 0, 0), Bucket(8, 600, 8)]
"""The last is filled up to 640 rows, a tile of 512 and one of 128; its scores have 608."""

WHOLE = Buckets(256, 640, 8, "mosaic_gpu").fit(8, 600, 8)
"""The same step on Hopper."""


@pytest.fixture
def few_buckets(monkeypatch):
    """For time's sake."""
    jax.clear_caches()
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.rows", [8])
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.all", lambda _: BUCKETS)
    yield monkeypatch
    jax.clear_caches()


@pytest.fixture
def on_a_gpu(few_buckets):
    """What asks JAX for its device hears that it is a GPU."""
    few_buckets.setattr(jax, "default_backend", lambda: "gpu")
    return few_buckets


def everything(model, buckets):
    """All tiles that could be proven."""
    found = [tiles for trial in trials(model, list(buckets)) for tiles in trial.candidates]
    return Tiles(sum((t.dots for t in found), ()), sum((t.attention for t in found), ()))


def base(model, buckets):
    return BASE


def compiled(chip, family, dtype, *, kind="xla", only=""):
    """An engine whose programs, all or those of one name, are compiled for the chip."""
    model = random_model(
        {"model_type": family} | COMMON | FAMILIES[family] | SHAPE,
        dtype=jnp.dtype(dtype),
        backend=kind,
        max_model_len=1024,
    )
    sizes = {"max_num_seqs": 256, "max_num_batched_tokens": 640, "num_pages": 20, "num_scheduler_steps": 4}
    engine = Engine(model, salt="", max_model_len=1024, **sizes)
    compile_programs(engine, functools.partial(compile_for, chip), only)
    return engine


def said(report):
    return "\n".join(f"{name}: {finding}" for name, finding in report.findings)


CASES = [
    ("T4", "llama", "float16", everything),
    ("L4", "qwen3", "bfloat16", base),
    ("A100", "gemma3_text", "float32", everything),
    ("H200", "qwen3", "bfloat16", everything),
]


@pytest.mark.parametrize(("chip", "family", "dtype", "proven"), CASES)
def test_what_xla_makes_of_the_xla_backend_is_clean(on_a_gpu, chip, family, dtype, proven):
    on_a_gpu.setattr("jaxdet.engine.engine.prove", proven)
    engine = compiled(chip, family, dtype)
    report, tiles = lint_step(engine.step_fn), engine.step_fn.tiles
    assert report.ok, said(report)
    assert len(report.programs) >= 15
    rows = {dot.rows for program in report.programs.values() for _, dot in dots(program)}
    assert (proven is everything) == bool(tiles.dots) == (512 in rows)


def test_merged_dots_are_named(on_a_gpu):
    """XLA would make one dot of 640 rows of tiles of 512 and 128, which share their weights."""
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    on_a_gpu.setattr("jaxdet.engine.engine.prove", everything)
    on_a_gpu.setattr("jaxdet.engine.step.compiler_options", lambda _: options)
    engine = compiled("H200", "llama", "bfloat16", only="model")
    found = [str(finding) for _, finding in lint_step(engine.step_fn).findings]
    assert any("rows=640" in why for why in found), found
    assert all("lacks" in why or "concatenate" in why for why in found), found


@pytest.mark.parametrize(("family", "only"), [("qwen3", ""), ("gemma3_text", "model")])
def test_what_xla_makes_beside_the_hopper_kernels_is_clean(few_buckets, family, only):
    """Down to the GPU's own instructions: ptxas is in the plugin."""
    few_buckets.setattr("jaxdet.engine.buckets.Buckets.all", lambda _: [*BUCKETS[:2], WHOLE])
    engine = compiled("H200", family, "bfloat16", kind="mosaic_gpu", only=only)
    report = lint_step(engine.step_fn)
    assert report.ok, said(report)
    launches = {
        name: sum(op.target.startswith("mosaic_gpu") for op in program.ops)
        for name, program in report.programs.items()
    }
    for name, count in launches.items():
        assert count >= {"model": 12, "decode": 12, "score": 2, "logprobs": 1}.get(name.split()[0], 0), name
    few, many = (
        launches[next(n for n in launches if n.startswith(f"model (({rows},)"))] for rows in (1, 256)
    )
    assert many - few == 4, "two norms of each of two layers are inside the products of one row"


def test_rows_that_fill_no_whole_tile_are_copied_on_hopper(few_buckets):
    engine = compiled("H200", "llama", "bfloat16", kind="mosaic_gpu", only="model")
    found = {name: str(finding) for name, finding in lint_step(engine.step_fn).findings}
    assert len(found) == 1 and "model ((608,)" in next(iter(found))
    assert all("matmul/mosaic_gpu_sm90.py" in why and "copies" in why for why in found.values())


GPU = {"backend": "mosaic_gpu"}


def half(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return half(*shape, dtype=jnp.int32)


def trained(function, count):
    """`function`'s result and the gradients by its first `count` operands."""

    def call(d, *operands):
        first, rest = operands[:count], operands[count:]
        out, pull = jax.vjp(lambda *first: function(*first, *rest), *first)
        return out, pull(d)

    return call


def attention_of(head_dim, heads=(8, 2), **option):
    """A prompt of 1300 tokens with its gradients, and 5 decoding rows."""
    pages, rows = half(20, heads[1], 128, head_dim), (5, heads[0], head_dim)
    call = functools.partial(attention, scale=0.125, **GPU, **option)
    prompt, q = functools.partial(call, max_query_len=1300), half(1300, heads[0], head_dim)
    name = f"attention {head_dim}, {heads}, {option}"
    yield name, trained(prompt, 3), (q, q, pages, pages, ints(1, 11), ints(2), ints(1))
    decode = functools.partial(call, max_query_len=1)
    yield f"decode {name}", decode, (half(*rows), pages, pages, ints(5, 11), ints(6), ints(5))


def matmuls(rows, k, n, **option):
    weights = half(k // 64, n, 64)
    product = functools.partial(matmul, n=n, **GPU, **option)
    gated = functools.partial(gated_matmul, n=n // 2, activation="silu", **GPU)
    yield f"matmul {rows}", trained(product, 2), (half(rows, n), half(rows, k), weights)
    yield f"gated {rows}", trained(gated, 2), (half(rows, n // 2), half(rows, k), weights)


def normed(rows, k, n):
    """Products that normalise their rows."""
    operands = half(rows, k), half(k // 64, n, 64), half(k, dtype=jnp.float32)
    for name, product in (
        ("matmul", functools.partial(matmul, n=n, **GPU)),
        ("gated", functools.partial(gated_matmul, n=n // 2, activation="silu", **GPU)),
    ):
        call = lambda x, packed, weight, product=product: product(x, packed, norm=(weight, 1e-6))  # noqa: E731
        yield f"normed {name} {rows}", call, operands


def clusters():
    """Products whose CTAs load weights for one another."""
    x, w, residual = half(768, 2560), half(40, 5120, 64), half(768, 5120)
    for tile in (Tile(64, 144, cluster=3), Tile(256, 192, 64, 2, cluster=3), Tile(128, 80, cluster=2)):
        call = lambda x, w, r, tile=tile: sm90.matmul(x, w, n=5120, residual=r, tile=tile)  # noqa: E731
        yield f"{tile}", call, (x, w, residual)


def others():
    f32 = functools.partial(half, dtype=jnp.float32)
    norm = functools.partial(rms_norm, eps=1e-6, **GPU)
    yield "rms_norm", trained(norm, 2), (half(600, 576), half(600, 576), f32(576))
    rotate = functools.partial(rope_cache, num_q_heads=8, num_kv_heads=2, **GPU)
    pages = half(4, 2, 128, 128)
    operands = half(300, 12 * 128), pages, pages, f32(512, 128), ints(300), ints(300)
    yield "rope_cache", rotate, operands
    logprobs = lambda x, ids: token_logprobs(x, ids, top=5, **GPU)[0]  # noqa: E731
    yield "token_logprobs", trained(logprobs, 1), (f32(70), f32(70, 151936), ints(70))


KERNELS = {
    name: (function, operands)
    for name, function, operands in (
        *(program for dim in (64, 96, 128, 256) for program in attention_of(dim)),
        *attention_of(128, (7, 1), window=200, soft_cap=30.0),
        *(program for rows in (1, 64, 2048) for program in matmuls(rows, 4096, 6144)),
        *matmuls(3, 2048, 2048),  # narrow tiles, deep stages
        *matmuls(500, 5120, 51200),  # a last round of narrow tiles
        *normed(1, 4096, 24576),
        *normed(4, 8192, 2048),
        *clusters(),
        *others(),
    )
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_hopper_kernel_compiles_for_its_gpu(name):
    """Down to its instructions, its gradient's kernels, too: what only Mosaic and ptxas find is found here."""
    function, operands = KERNELS[name]
    program = compile_for("H200", function, *operands)
    assert "mosaic_gpu" in program.as_text()
    if name.startswith("normed"):
        assert program.as_text().count('custom_call_target="mosaic_gpu') == 1
