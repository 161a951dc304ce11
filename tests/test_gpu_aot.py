"""Every program that an engine compiles, compiled for GPUs that are not here: the lint reads what XLA makes of it."""

import jax
import jax.numpy as jnp
import pytest
from gpu_chips import compiler, needs_plugin

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.engine import Engine
from jaxdet.engine.larger_tiles import trials
from jaxdet.testing import COMMON, FAMILIES, random_model
from jaxdet.verify.hlo import dots, lint_step
from pallas_kernels.proven import BASE, Tiles

pytestmark = [pytest.mark.slow, needs_plugin]

SHAPE = {"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPE |= {"head_dim": 64, "vocab_size": 259}

BUCKETS = [Bucket(1, 0, 0), Bucket(256, 0, 0), Bucket(8, 632, 8)]


@pytest.fixture
def few_buckets(monkeypatch):
    """For time's sake. JAX would keep programs on disk, and fail to read them the next time."""
    jax.clear_caches()
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.rows", [8])
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.all", lambda _: BUCKETS)
    yield monkeypatch
    jax.config.update("jax_enable_compilation_cache", enabled)
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
    for job in engine.wanted.jobs(lambda step: compiler(step, chip, only)):
        job()
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
    assert any("rows=640" in why for why in found) and all("lacks" in why for why in found), found


@pytest.mark.usefixtures("few_buckets")
@pytest.mark.parametrize(("family", "only"), [("qwen3", ""), ("gemma3_text", "model")])
def test_what_xla_makes_beside_the_hopper_kernels_is_clean(family, only):
    """Down to the GPU's own instructions: ptxas is in the plugin."""
    engine = compiled("H200", family, "bfloat16", kind="mosaic_gpu", only=only)
    report = lint_step(engine.step_fn)
    assert report.ok, said(report)
    for name, program in report.programs.items():
        kernels = sum(op.target.startswith("mosaic_gpu") for op in program.ops)
        assert kernels >= {"model": 16, "decode": 16, "score": 2, "logprobs": 1}.get(name.split()[0], 0), name
