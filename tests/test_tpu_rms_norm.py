"""RMSNorm's TPU kernel, interpreted: rows are independent, results close to float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_rows import POOL, assert_rows_independent, error, random

from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.rms_norm.op import rms_norm

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [64, 576, 2048])
def test_rows_never_matter(size, dtype):
    weight, pool = random(1, size, np.float32), random(0, (POOL, size), dtype)
    f = jax.jit(functools.partial(rms_norm, weight=weight, eps=1e-5, backend="mosaic_tpu"))
    with tpu_interpreter():
        assert_rows_independent(f, pool)
        found = f(pool)
    wide = pool.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight.astype(np.float64)
    assert found.dtype == dtype
    error("rms_norm", found, exact)
    limit = 5e-7 + jnp.finfo(dtype).eps / 2
    assert (np.abs(np.asarray(found, np.float64) - exact) <= limit * np.abs(exact) + 1e-7).all()


def test_a_norm_over_the_batch_is_found():
    """Negative control: XLA's own mean of squares, whose order follows the number of rows."""
    plain = jax.jit(lambda x: x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True)))
    with pytest.raises(AssertionError, match="rows"):
        assert_rows_independent(plain, random(0, (POOL, 576), np.float32))


def test_float16_names_the_backend_that_takes_it():
    with pytest.raises(ValueError, match="use backend='xla'"):
        rms_norm(jnp.ones((1, 64), jnp.float16), jnp.ones(64), eps=1e-6, backend="mosaic_tpu")
