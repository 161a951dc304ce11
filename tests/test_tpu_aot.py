"""Every TPU kernel, and whole steps of two models, compiled for chips that are not here."""

import jax
import jax.numpy as jnp
import pytest
from tpu_chips import CHIPS, HBM, VMEM, compile_for, needs_libtpu
from tpu_programs import BF16, KERNELS, hbm, kernels_called, shape, step_program, steps, vmem

from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.testing import SMOLLM2
from jaxdet.verify.hlo import lint
from pallas_kernels.attention.op import attention
from pallas_kernels.compat import reset_compilation_cache
from pallas_kernels.numerics import PAGE_SIZE

pytestmark = [pytest.mark.tpu_aot, needs_libtpu]


CACHE_PART = 24 * 2**20
"""Bytes of the smallest part of a cache below; a prompt's queries, moved into tiles, are smaller."""


def assert_pinned_and_fits(compiled, chip):
    assert lint({chip: compiled.text}, "mosaic_tpu", at_least=CACHE_PART).findings == []
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


@pytest.mark.parametrize("own", [lambda x: x @ x.T, lambda x: x.sum(axis=1), lambda x: x * x + x])
def test_arithmetic_of_xlas_own_is_found(own):
    """Negative control."""
    compiled = compile_for("v5e", own, shape(256, 256))
    with pytest.raises(AssertionError, match="Finding"):
        assert_pinned_and_fits(compiled, "v5e")


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
