"""RMSNorm's gradient on Hopper without a GPU: interpreted on small shapes, lowered for CUDA on real ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.rms_norm.backward_sm90 import rms_norm

EPS = 1e-6


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


@functools.cache
def call():
    return jax.jit(functools.partial(rms_norm, eps=EPS))


def gradient(x, weight, total, dy):
    with gpu_interpreter():
        return call()(x, weight, total, dy)


@pytest.mark.interpret
@pytest.mark.parametrize("size", [256, 200])
def test_bits_and_closeness(size):
    """Alone, in company, cut into micro-batches; rows without a gradient add nothing, NaN or not."""
    x, dy = normal(0, 192, size), normal(1, 192, size)
    weight, start = 1 + normal(2, size, dtype=jnp.float32), normal(3, size, dtype=jnp.float32)
    dx, total = gradient(x, weight, start, dy)

    first, so_far = gradient(x[:64], weight, start, dy[:64])
    second, so_far = gradient(x[64:], weight, so_far, dy[64:])
    np.testing.assert_array_equal(bits(jnp.concatenate([first, second])), bits(dx))
    np.testing.assert_array_equal(bits(so_far), bits(total))
    turned = np.r_[64:192, 0:64]
    assert (bits(gradient(x[turned], weight, start, dy[turned])[1]) != bits(total)).any()

    dead = np.r_[3, 70:90, 191]
    still = dy.at[dead].set(0)
    clean, poisoned = (gradient(rows, weight, start, still) for rows in (x, x.at[dead].set(jnp.nan)))
    np.testing.assert_array_equal(bits(poisoned[0]), bits(clean[0]))
    np.testing.assert_array_equal(bits(poisoned[1]), bits(clean[1]))
    assert not bits(clean[0][dead]).any()
    hostile = x.at[::2].set(jnp.inf).at[1::4].set(1e30)
    np.testing.assert_array_equal(bits(gradient(hostile, weight, start, dy)[0][3::4]), bits(dx[3::4]))
    assert np.isnan(np.asarray(gradient(x.at[5].set(jnp.nan), weight, start, dy)[1])).all()

    wide_x, wide_w, wide_dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    inverse = 1 / np.sqrt((wide_x**2).mean(1, keepdims=True) + EPS)
    n, g = wide_x * inverse, wide_dy * wide_w
    exact = (g - n * (g * n).mean(1, keepdims=True)) * inverse
    assert np.linalg.norm(np.asarray(dx, np.float64) - exact) / np.linalg.norm(exact) < 2.5e-3
    exact = np.asarray(start, np.float64) + (n * wide_dy).sum(0)
    assert np.linalg.norm(np.asarray(total, np.float64) - exact) / np.linalg.norm(exact) < 1e-6


@pytest.mark.interpret
def test_heads_of_a_row_belong_together():
    """A cut between rows of three heads changes no bit."""
    x, dy, zero, one = (
        normal(0, 128 * 3, 128),
        normal(1, 128 * 3, 128, dtype=jnp.float32),
        jnp.zeros(128),
        jnp.ones(128),
    )
    with gpu_interpreter():
        several = jax.jit(functools.partial(rms_norm, eps=EPS, each=3))
        dx, total = several(x, one, zero, dy)
        cut = 64 * 3
        first, so_far = several(x[:cut], one, zero, dy[:cut])
        second, so_far = several(x[cut:], one, so_far, dy[cut:])
        odd = (
            several(x[cut:-6], one, zero, dy[cut:-6])[1],
            several(x[cut:], one, zero, dy[cut:].at[-6:].set(0))[1],
        )
    np.testing.assert_array_equal(bits(jnp.concatenate([first, second])), bits(dx))
    np.testing.assert_array_equal(bits(so_far), bits(total))
    np.testing.assert_array_equal(*map(bits, odd))


@pytest.mark.parametrize("size", [128, 576, 4096, 5120, 8192])
def test_lowers_for_cuda(size):
    rows, each = jax.ShapeDtypeStruct((2048, size), jnp.bfloat16), jax.ShapeDtypeStruct((size,), jnp.float32)
    traced = call().trace(rows, each, each, rows)
    assert "rms_norm_gradient" in traced.lower(lowering_platforms=("cuda",)).as_text()
