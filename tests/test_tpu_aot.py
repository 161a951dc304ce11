"""Every TPU kernel, and whole steps of two models, compiled for chips that are not here."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from engine_programs import compile_programs
from tpu_chips import CHIPS, HBM, VMEM, compile_for, needs_libtpu
from tpu_programs import BF16, KERNELS, TPU, hbm, kernels_called, shape, step_program, steps, vmem

from jaxdet.engine.buckets import Bucket
from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.engine.engine import Engine
from jaxdet.testing import QWEN3_8B, SMOLLM2, random_model
from jaxdet.verify import hlo_module
from jaxdet.verify.hlo import copies, lint, lint_step
from pallas_kernels.attention.op import attention
from pallas_kernels.compat import reset_compilation_cache
from pallas_kernels.numerics import PAGE_SIZE

pytestmark = [pytest.mark.tpu_aot, needs_libtpu]

POOL = 3000
"""Pages of a cache whose parts fit no VMEM, as any real one's: XLA moves smaller ones there to copy pages in them."""


def assert_pinned_and_fits(compiled, chip):
    """The rules and limits are those of `jaxdet verify --hlo`; before XLA's changes narrow roundings are seen, too."""
    for text in (compiled.unoptimised, compiled.text):
        assert lint({chip: text}, "mosaic_tpu").findings == []
    assert 0 < vmem(compiled) < VMEM[chip] * 2**20
    assert hbm(compiled) < HBM[chip] * 2**30


@pytest.mark.parametrize(
    "chip", ["v5e", "tpu7x", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "v6e"))]
)
@pytest.mark.parametrize("program", KERNELS, ids=lambda p: p.name.replace(" ", ""))
def test_kernels_compile_and_fit(program, chip):
    compiled = program.compile(chip)
    assert kernels_called(compiled) == 1
    assert_pinned_and_fits(compiled, chip)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_the_cache_is_never_copied(dim):
    """Whatever the head_dim: XLA keeps the pages as the kernels want them, and writes them in place."""
    pages = shape(2048, 8, PAGE_SIZE, dim)
    index = lambda *dims: shape(*dims, dtype=jnp.int32)  # noqa: E731
    operands = shape(8, 8, dim), pages, pages, index(8, 4), index(9), index(8)

    def decode(*operands):
        return attention(*operands, scale=1.0, max_query_len=1, backend="mosaic_tpu")

    size = compile_for("v5e", decode, *operands).program.memory_analysis()
    assert size.temp_size_in_bytes < 2**20

    def misread(q, k_pages, *rest):
        return decode(q, jnp.flip(k_pages, 2), *rest)

    size = compile_for("v5e", misread, *operands).program.memory_analysis()
    assert size.temp_size_in_bytes > 2**28, "a copied cache would be seen"


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "number",
    range(5),
    ids=["smollm2-decode", "smollm2-mixed", "smollm2-repeated", "qwen3-decode", "qwen3-mixed"],
)
def test_whole_steps_compile_and_fit(number, chip):
    program = steps(chip)[number]
    compiled = program.compile(chip)
    layers = len(program.operands[1])
    # Two norms, qkv, rope, output, gate and up, down, and an attention for decoding rows and one for prompts.
    in_layer = 8 + ("+" in program.name)
    assert kernels_called(compiled) == in_layer * layers + 3, "final norm, head, sampling"
    assert_pinned_and_fits(compiled, chip)
    size = compiled.program.memory_analysis()
    cache = sum(x.size for pair in program.operands[1] for x in pair) * jnp.dtype(BF16).itemsize
    assert size.alias_size_in_bytes >= cache, "the cache is written in place"
    assert size.temp_size_in_bytes < 2**28 < cache, "and not copied"


@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_a_step_of_one_row_is_pinned_too(chip):
    """XLA writes a reshape that drops an axis of 1 as a sum of single values; that is none."""
    config = SMOLLM2 | {"num_hidden_layers": 1}
    compiled = step_program("one layer", config, rows=1, prompt_tokens=0, pages=512).compile(chip)
    assert kernels_called(compiled) == 11
    assert_pinned_and_fits(compiled, chip)


ONE_LAYER = {"num_hidden_layers": 1}

PLANTS = {
    "jnp.sum": (lambda w, pages: jnp.sum(w, axis=1), "reduces floats"),
    "dot": (lambda w, pages: w[:256] @ w[:256].T, "sums in an order"),
    "product and sum": (lambda w, pages: w * w + w, "contract"),
    "turned weight": (lambda w, pages: w.T, "copies 60.0 MB"),
    "turned weight behind a barrier": (lambda w, pages: jax.lax.optimization_barrier(w).T, "copies 60.0 MB"),
    "turned cache": (lambda w, pages: jnp.flip(pages, 0), "copies 24.0 MB"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_names_what_is_planted_beside_the_kernels(name):
    plant, why = PLANTS[name]
    program = step_program("one layer", SMOLLM2 | ONE_LAYER, rows=8, prompt_tokens=0, pages=512)

    def step(state, cache, *rest):
        return *program.function(state, cache, *rest), plant(state["head"].get_value(), cache[0][0])

    compiled = dataclasses.replace(program, function=step).compile("v5e")
    assert kernels_called(compiled) == 11
    for text in [compiled.text] if "copies" in why else [compiled.unoptimised, compiled.text]:
        found = [finding for _, finding in lint({"step": text}, "mosaic_tpu").findings]
        assert any(why in finding.why for finding in found), found
        # A copy of an argument in another layout has the argument's name alone.
        assert all("test_tpu_aot.py" in f.op.source or f.op.source.startswith("state") for f in found), found


def test_what_xla_moves_of_a_steps_own_values_is_no_copy():
    """A prompt's queries, and results that it had in VMEM: far more than the 1 MB from which a copy is reported."""
    program = step_program("one layer", QWEN3_8B | ONE_LAYER, rows=64, prompt_tokens=1984, pages=256)
    compiled = program.compile("tpu7x")
    assert sum(finding.op.size for finding in copies(hlo_module.Program(compiled.text))) > 2**24
    assert_pinned_and_fits(compiled, "tpu7x")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "tpu7x"])
def test_every_program_of_an_engine_is_pinned(monkeypatch, chip):
    """Scores, log-probabilities, draws, adjustments and the rest, as `jaxdet verify --hlo` has them; few buckets."""
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.rows", [8])
    buckets = [Bucket(1, 0, 0), Bucket(64, 0, 0), Bucket(8, 1024, 8)]
    monkeypatch.setattr("jaxdet.engine.buckets.Buckets.all", lambda _: buckets)
    model = random_model(SMOLLM2 | ONE_LAYER, dtype=jnp.dtype(BF16), backend=TPU, max_model_len=1024)
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 1032, "num_pages": POOL, "num_scheduler_steps": 4}
    engine = Engine(model, salt="", max_model_len=1024, **sizes)
    unoptimised = {}

    def compile_(function, *operands, jit):
        compiled = compile_for(chip, function, *operands, jit=jit)
        unoptimised[len(unoptimised)] = compiled.unoptimised
        return compiled.program

    compile_programs(engine, compile_)
    report = lint_step(engine.step_fn)
    assert report.findings == []
    assert lint({str(i): text for i, text in unoptimised.items()}, TPU).findings == []
    kernels = {"model": 10, "decode": 11, "draw": 1, "logprobs": 1, "score": 2}
    assert {name.split()[0] for name in report.programs} == {*kernels, "adjust", "restrict", "copy"}
    for name, program in report.programs.items():
        called = sum(op.target == "tpu_custom_call" for op in program.ops)
        assert called >= kernels.get(name.split()[0], 0), name


def test_a_kept_program_is_no_obstacle(monkeypatch, tmp_path):
    """JAX keeps a program for a TPU that isn't here, and can't read it again: a second run must not try."""
    settings = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in settings}
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        use_compile_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for _ in range(2):
            jax.clear_caches()  # as in a new process
            assert kernels_called(KERNELS[0].compile("v5e")) == 1
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_compilation_cache()
