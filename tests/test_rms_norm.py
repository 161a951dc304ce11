"""RMSNorm and the pinned row sums of the xla backend: a row's bits depend on that row alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reduce import log_sum_exp, row_sum
from pallas_kernels.rms_norm.op import rms_norm

DTYPES = ("float32", "bfloat16", "float16")
ROWS = (1, 2, 7, 8, 31, 33, 64, 130)
POOL = 8


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def random(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def assert_rows_independent(f, pool, counts):
    alone = np.concatenate([bits(f(pool[i : i + 1])) for i in range(len(pool))])
    rng = np.random.default_rng(0)
    for m in counts:
        picked, poisoned = rng.integers(0, len(pool), m), rng.random(m) < 0.3
        x = pool[picked]
        with np.errstate(over="ignore"):
            x[poisoned] = rng.choice([np.nan, np.inf, 1e30], (poisoned.sum(), 1)).astype(pool.dtype)
        np.testing.assert_array_equal(bits(f(x))[~poisoned], alone[picked][~poisoned], err_msg=f"{m} rows")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 576, 897, 2048, 8193])
def test_rows_never_matter(size, dtype):
    """Rows × size crosses 4096, where XLA changes the order of its own reductions."""
    weight, pool = jnp.asarray(random(1, size, "float32")), random(0, (POOL, size), dtype)
    f = jax.jit(partial(rms_norm, weight=weight, eps=1e-5))
    assert_rows_independent(f, pool, ROWS if size < 8192 else (2, 9))
    wide = pool.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * np.asarray(weight, np.float64)
    found = f(pool)
    assert found.dtype == jnp.dtype(dtype)
    limit = 3e-7 + jnp.finfo(found.dtype).eps / 2
    assert (np.abs(np.asarray(found, np.float64) - exact) <= limit * np.abs(exact) + 1e-7).all()


def test_zero_and_huge_rows():
    """A row of zeros stays zero; a row whose squares overflow becomes zero, not NaN."""
    x = np.stack([np.zeros(64), np.full(64, 1e30)]).astype(np.float32)
    assert (np.asarray(rms_norm(x, jnp.ones(64), eps=1e-6)) == 0).all()


@pytest.mark.parametrize("size", [1, 64, 100, 4097, 8192, 8193, 49152])
def test_row_sum_is_the_documented_tree(size):
    """NumPy, adding in the order that the docstring names, finds the same bits."""
    x = random(0, (3, size), "float32")
    lanes = 1024 if size > 8192 else 64
    padded = np.pad(x, ((0, 0), (0, -size % lanes))).reshape(3, -1, lanes)
    total = padded[:, 0]
    for group in range(1, padded.shape[1]):
        total = total + padded[:, group]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    np.testing.assert_array_equal(bits(jax.jit(row_sum)(x)), bits(total))


@pytest.mark.parametrize("size", [288, 4096, 49152])
def test_log_sum_exp(size):
    """Rows are independent; −inf entries are no-ops wherever the row ends."""
    pool = 5 * random(0, (POOL, size), "float32")
    f = jax.jit(lambda x: jnp.concatenate(log_sum_exp(x), axis=1))
    assert_rows_independent(f, pool, (1, 2, 9, 33))
    wide = pool.astype(np.float64)
    exact = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(np.asarray(f(pool))[:, 1], exact, atol=1e-6)
    padded = np.pad(pool, ((0, 0), (0, 64)), constant_values=-np.inf)
    np.testing.assert_array_equal(bits(f(padded)), bits(f(pool)))


def test_plain_norm_depends_on_rows():
    """Negative control: XLA's own mean of squares."""
    plain = jax.jit(lambda x: x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True)))
    with pytest.raises(AssertionError, match="rows"):
        assert_rows_independent(plain, random(0, (POOL, 576), "float32"), ROWS)
