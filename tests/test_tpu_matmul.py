"""The TPU matmul, interpreted: one summation order whatever the number of rows, results close to float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_rows import POOL, assert_rows_independent, bits, error, random

from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.matmul import mosaic_tpu
from pallas_kernels.matmul.op import gated_matmul, matmul, pack, pack_gated, take_columns, unpack

pytestmark = pytest.mark.interpret
TPU = "mosaic_tpu"
DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks of k and tiles of columns at sizes that the interpreter gets through."""
    monkeypatch.setattr(mosaic_tpu, "BLOCK_BYTES", 512)
    monkeypatch.setattr(mosaic_tpu, "COLUMN_TILE", 256)


def assert_close(found, exact, depth):
    assert error("matmul", found, exact) <= jnp.finfo(found.dtype).eps / 2 + 1e-7 * depth**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(576, 640), (300, 100)])
def test_rows_never_matter(k, n, dtype):
    w, pool = random(1, (k, n), dtype), random(0, (POOL, k), dtype)
    f = jax.jit(functools.partial(matmul, packed=pack(w, TPU), n=n, backend=TPU))
    with tpu_interpreter():
        assert_rows_independent(f, pool)
        found = f(pool)
    assert_close(found, pool.astype(np.float64) @ w.astype(np.float64), k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(dtype):
    """Bias and residual are added in float32 before the one rounding; their rows don't matter either."""
    k, n = 300, 200
    w, pool = random(1, (k, n), dtype), random(0, (POOL, k + n), dtype)
    bias = random(2, n, np.float32)

    @jax.jit
    def f(x):
        return matmul(x[:, :k], pack(w, TPU), n=n, bias=bias, residual=x[:, k:], backend=TPU)

    with tpu_interpreter():
        assert_rows_independent(f, pool, (2, 130))
        found = f(pool)
    wide = pool.astype(np.float64)
    assert_close(found, wide[:, :k] @ w.astype(np.float64) + bias + wide[:, k:], k)


@pytest.mark.parametrize(("dtype", "k"), [(jnp.bfloat16, 12288), (jnp.float32, 4096)])
def test_rows_never_matter_at_the_sizes_that_tpus_run(dtype, k, monkeypatch):
    """Blocks of k and tiles of columns as they are, of Qwen3-8B's depths; more than one of each."""
    monkeypatch.undo()
    n = 600
    assert -(-k // mosaic_tpu.block_k(k, dtype)) >= 4 and n > mosaic_tpu.COLUMN_TILE
    w, pool = random(1, (k, n), dtype), random(0, (POOL, k), dtype)
    f = jax.jit(functools.partial(matmul, packed=pack(w, TPU), n=n, backend=TPU))
    with tpu_interpreter():
        assert_rows_independent(f, pool[:2], (130,))
        found = f(pool)
    assert_close(found, pool.astype(np.float64) @ w.astype(np.float64), k)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(activation, dtype):
    k, n = 300, 200
    gate, up, pool = random(1, (k, n), dtype), random(2, (k, n), dtype), random(0, (POOL, k), dtype)
    packed = pack_gated(gate, up, TPU)
    f = jax.jit(functools.partial(gated_matmul, packed=packed, n=n, activation=activation, backend=TPU))
    with tpu_interpreter():
        assert_rows_independent(f, pool, (2, 130))
        found = f(pool)
    x, y = (pool.astype(np.float64) @ half.astype(np.float64) for half in (gate, up))
    tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    assert_close(found, {"silu": x / (1 + np.exp(-x)), "gelu_tanh": x / 2 * (1 + tanh)}[activation] * y, k)


def test_an_order_that_follows_the_rows_is_found():
    """Negative control: a wider dot for fewer rows, as a tuner would choose."""
    w, pool = random(1, (576, 640), np.float32), random(0, (POOL, 576), np.float32)

    def tuned(x):
        blocks = 4 if len(x) > 8 else 1
        return sum(jnp.dot(a, b) for a, b in zip(np.split(x, blocks, 1), np.split(w, blocks), strict=True))

    with pytest.raises(AssertionError, match="rows"):
        assert_rows_independent(tuned, pool)


@pytest.mark.parametrize("like", [np.asarray, jnp.asarray])
def test_packing_is_exact(like):
    w = random(0, (300, 100), jnp.bfloat16)
    packed = pack(like(w), TPU)
    assert type(packed) is type(like(w))
    np.testing.assert_array_equal(bits(unpack(packed, 300, 100, TPU)), bits(w))
    ids = jnp.array([7, 0, 99, 7])
    np.testing.assert_array_equal(bits(take_columns(jnp.asarray(packed), ids, 300, TPU)), bits(w.T[ids]))


@pytest.mark.parametrize("k", [64, 576, 1536, 4096, 9728, 12288, 14336, 18944])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_real_models_pad_little(k, dtype, monkeypatch):
    monkeypatch.undo()
    step = mosaic_tpu.block_k(k, dtype)
    assert step % 128 == 0 and step * jnp.dtype(dtype).itemsize <= mosaic_tpu.BLOCK_BYTES
    assert -(-k // step) * step <= max(128 * -(-k // 128), 1.02 * k)


def test_errors_name_the_remedy():
    packed = pack(jnp.ones((64, 64), jnp.bfloat16), TPU)
    with pytest.raises(ValueError, match="cast them to one dtype"):
        matmul(jnp.ones((1, 64)), packed, n=64, backend=TPU)
    with pytest.raises(ValueError, match="use backend='xla'"):
        matmul(jnp.ones((1, 64), jnp.float16), packed.astype(jnp.float16), n=64, backend=TPU)
    with pytest.raises(ValueError, match=r"pack a \[640, N\] matrix"):
        matmul(jnp.ones((1, 640), jnp.bfloat16), packed, n=64, backend=TPU)
    with pytest.raises(ValueError, match="use one of"):
        gated_matmul(jnp.ones((1, 64), jnp.bfloat16), packed[None], n=64, activation="relu", backend=TPU)
