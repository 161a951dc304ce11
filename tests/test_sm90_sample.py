"""Hopper sampling without a GPU: interpreted against the xla backend and itself, lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.sample import mosaic_gpu_sm90 as kernel
from pallas_kernels.sample import xla
from pallas_kernels.sample.op import SamplingRows

ROWS, VOCAB = 4, 8300  # two chunks


def _rows(count: int) -> SamplingRows:
    rng = np.random.default_rng(1)
    of = lambda dtype, *values: jnp.asarray(np.resize(values, count), dtype)  # noqa: E731
    return SamplingRows(
        temperature=of(jnp.float32, 0, 0.7, 1, 1.3),
        top_k=of(jnp.int32, 0, 0, 5, 40),
        top_p=of(jnp.float32, 1, 0.9, 1, 0.5),
        min_p=of(jnp.float32, 0, 0, 0, 0.05),
        seed=jnp.asarray(rng.integers(0, 2**32, (count, 2)), jnp.uint32),
        sample_index=of(jnp.int32, 0, 1, 2),
        position=jnp.arange(count, dtype=jnp.int32),
    )


def _logits() -> jax.Array:
    logits = jax.random.normal(jax.random.key(0), (ROWS, VOCAB)) * 3
    return logits.at[2:4].set(jnp.round(logits[2:4]))  # ties at every edge


def _take(rows: SamplingRows, index) -> SamplingRows:
    return jax.tree.map(lambda x: x[index], rows)


@pytest.mark.slow
@pytest.mark.interpret
def test_tokens_are_the_xla_backends_and_rows_are_independent():
    logits, rows = _logits(), _rows(ROWS)
    with gpu_interpreter():
        tokens, usable = jax.jit(kernel.sample)(logits, rows)
        index = jnp.array([3, 0])
        hostile = logits[index].at[1].set(jnp.nan)
        few, few_usable = jax.jit(kernel.sample)(hostile, _take(rows, index))
    np.testing.assert_array_equal(tokens, jax.jit(xla.sample)(logits, rows)[0])
    assert usable.all() and few_usable.tolist() == [True, False]
    np.testing.assert_array_equal(few[0], tokens[3])
    other = dataclasses.replace(rows, position=rows.position + 1)
    assert (jax.jit(xla.sample)(logits, other)[0] != tokens)[1:].any(), "another noise gives other tokens"


def test_sampling_lowers_for_cuda():
    logits = jax.ShapeDtypeStruct((3, 151936), jnp.float32)
    jax.jit(kernel.sample).trace(logits, _rows(3)).lower(lowering_platforms=("cuda",))
