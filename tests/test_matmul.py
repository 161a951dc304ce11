"""Matrix products of the xla backend: a row's bits never depend on the other rows.

This file is the proof behind `backend.ROW_FREE_ISAS`; the path with row tiles is tested on every machine.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.matmul import xla
from pallas_kernels.matmul.op import gated_matmul, matmul, pack, pack_gated, take_columns, unpack
from pallas_kernels.numerics import GPU_ROW_TILES

DTYPES = ("float32", "bfloat16", "float16")
POOL = 16
ROWS = (1, 2, 3, 8, 33, 47, 50, 64, 65, 128, 257, 1024)
POISON = (np.nan, np.inf, -np.inf, 1e30)


@pytest.fixture(params=["default", "row_tiles", pytest.param("gpu_row_tiles", marks=pytest.mark.slow)])
def path(request, monkeypatch):
    """How this machine serves products, and the paths of machines without proven row freedom."""
    if request.param != "default":
        monkeypatch.setattr(xla, "rows_are_free", lambda: False)
    if request.param == "gpu_row_tiles":
        monkeypatch.setattr(xla, "row_tile", lambda dtype: GPU_ROW_TILES[np.dtype(dtype).itemsize])
    return request.param


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def random(seed, shape, dtype, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(jnp.dtype(dtype))


def assert_rows_independent(f, pool, counts, seed=0):
    """`f(x)[i]` equals `f(x[i : i + 1])` for each count of rows, at any position, with poisoned neighbours."""
    alone = np.concatenate([bits(f(pool[i : i + 1])) for i in range(len(pool))])
    rng = np.random.default_rng(seed)
    for m in counts:
        picked = rng.integers(0, len(pool), m)
        x = pool[picked]
        poisoned = rng.random(m) < 0.3
        with np.errstate(over="ignore"):
            x[poisoned] = rng.choice(POISON, (poisoned.sum(), 1)).astype(pool.dtype)
        found = bits(f(x))
        assert found.shape == (m, *alone.shape[1:])
        np.testing.assert_array_equal(found[~poisoned], alone[picked][~poisoned], err_msg=f"{m} rows")


def product(k, n, dtype):
    w = pack(jnp.asarray(random(1, (k, n), dtype, k**-0.5)))
    f = jax.jit(partial(matmul, n=n, out_dtype=jnp.float32))
    return lambda x: f(x, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "n"),
    [(576, 960), (1536, 576), (130, 320), (64, 64), (1000, 201), (7, 1), (897, 1152)],
    ids=lambda v: str(v),
)
def test_rows_never_matter(k, n, dtype, path):
    counts = ROWS if path == "default" else (1, 8, 9, 33)
    assert_rows_independent(product(k, n, dtype), random(0, (POOL, k), dtype), counts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "n", "dtype"), [(576, 960, "float32"), (1500, 130, "bfloat16"), (200, 320, "float16")]
)
def test_every_number_of_rows(k, n, dtype):
    counts = [*range(1, 131), 192, 255, 256, 257, 511, 513, 777, 1000, 1023, 1024]
    assert_rows_independent(product(k, n, dtype), random(0, (POOL, k), dtype), counts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "n"),
    [(576, 49152), (576, 3072), (2048, 3072), (8192, 2048), (2048, 16384), (1024, 6144), (3072, 1024)],
    ids=lambda v: str(v),
)
def test_shapes_of_real_models(k, n, dtype):
    """SmolLM2-135M, Llama-3.2-1B and Qwen3-0.6B, heads and gated halves side by side included."""
    assert_rows_independent(product(k, n, dtype), random(0, (4, k), dtype), (2, 8, 50, 64, 65, 200))


@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(dtype, path):
    """Bias, residual, both activations and every result dtype leave rows independent and are close to float64."""
    k, n = 320, 136
    x, w, up = (
        random(0, (POOL, k), dtype),
        random(1, (k, n), dtype, k**-0.5),
        random(2, (k, n), dtype, k**-0.5),
    )
    bias, residual = random(3, n, "float32"), random(4, (POOL, n), dtype)
    wide = [a.astype(np.float64) for a in (x, w, up, residual)]
    gate, right = wide[0] @ wide[1], wide[0] @ wide[2]
    gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    packed, both = pack(w), pack_gated(w, up)
    both_rows = np.concatenate([x, residual], axis=1)
    cases = {
        "plain": (lambda r: matmul(r[:, :k], packed, n=n), gate),
        "bias": (lambda r: matmul(r[:, :k], packed, n=n, bias=jnp.asarray(bias)), gate + bias),
        "residual": (lambda r: matmul(r[:, :k], packed, n=n, residual=r[:, k:]), gate + wide[3]),
        "float32": (
            lambda r: matmul(
                r[:, :k], packed, n=n, bias=jnp.asarray(bias), residual=r[:, k:], out_dtype=jnp.float32
            ),
            gate + bias + wide[3],
        ),
        "silu": (
            lambda r: gated_matmul(r[:, :k], both, n=n, activation="silu"),
            gate / (1 + np.exp(-gate)) * right,
        ),
        "gelu_tanh": (lambda r: gated_matmul(r[:, :k], both, n=n, activation="gelu_tanh"), gelu * right),
    }
    for name, (f, exact) in cases.items():
        f = jax.jit(f)
        found = f(both_rows)
        assert found.dtype == (jnp.float32 if name == "float32" else jnp.dtype(dtype))
        limit = 4e-6 if name == "float32" else 4e-6 + jnp.finfo(found.dtype).eps
        assert np.abs(np.asarray(found, np.float64) - exact).max() < limit * np.abs(exact).max(), name
        assert_rows_independent(f, both_rows, (1, 7, 33, 65) if path == "default" else (1, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_unpack_and_columns(dtype, path):
    """Layouts move bits only, NaN payloads included, and a column is what the embedding says."""
    for k, n in ((576, 960), (513, 65), (1, 1), (64, 64), (1100, 130)):
        raw = np.random.default_rng(k).integers(0, 256, (k, n * jnp.dtype(dtype).itemsize), np.uint8)
        w = raw.view(jnp.dtype(dtype))
        packed = pack(w)
        assert isinstance(packed, np.ndarray)
        np.testing.assert_array_equal(bits(unpack(packed, k, n)), bits(w))
        ids = np.random.default_rng(n).integers(0, n, 9).astype(np.int32)
        found = jax.jit(partial(take_columns, k=k))(jnp.asarray(packed), ids)
        np.testing.assert_array_equal(bits(found), bits(w[:, ids].T))


def test_row_freedom_is_decided_by_the_instruction_set(monkeypatch):
    """Row tiles everywhere but on the instruction sets that this file was run on."""
    assert backend.rows_are_free() == (backend.isa() in backend.ROW_FREE_ISAS)
    for isa in ("x86_64/avx2", "x86_64/avx512", "x86_64/avx512_amx", "arm64"):
        monkeypatch.setattr(backend, "isa", lambda isa=isa: isa)
        assert not backend.rows_are_free()


def test_plain_dot_depends_on_rows():
    """Negative control: the check sees what `jnp.dot` does."""
    w = jnp.asarray(random(1, (576, 960), "float32"))
    plain = jax.jit(lambda x: jnp.dot(x, w, precision="highest"))
    with pytest.raises(AssertionError, match="rows"):
        assert_rows_independent(plain, random(0, (POOL, 576), "float32"), ROWS)


SETTINGS = {
    "one_core": {},
    "excess_precision_off": {"XLA_FLAGS": "--xla_allow_excess_precision=false"},
    "one_thread_many_devices": {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=4"
    },
    "x64_and_low_precision": {"JAX_ENABLE_X64": "1", "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
}


def digests(*, one_core=False, **settings):
    """What tests/op_digests.py prints in a process of its own."""
    pin = (lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})) if one_core else None
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", Path(__file__).parent / "op_digests.py"],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | settings,
        preexec_fn=pin,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def default_digests():
    return digests()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_process_never_matter(name, default_digests):
    assert digests(one_core=name == "one_core", **SETTINGS[name]) == default_digests
