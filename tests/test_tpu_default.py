"""Which backend None means on a TPU that is not here."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend, registry

MODEL = {"dtype": jnp.bfloat16, "head_dim": 64, "num_q_heads": 9, "num_kv_heads": 3}


@pytest.fixture
def tpu(monkeypatch, caplog):
    """Pretends that the machine has a TPU; returns the log."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    backend._say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize("change", [{}, {"dtype": jnp.float32}, {"head_dim": 256}, {"num_q_heads": 192}])
def test_a_tpu_takes_its_own_kernels_without_a_word(tpu, change):
    assert backend.resolve(None, **MODEL | change) == "mosaic_tpu"
    assert not tpu.records


@pytest.mark.parametrize(
    ("change", "reason"), [({"dtype": jnp.float16}, "dtype float16"), ({"head_dim": 512}, "head_dim 512")]
)
def test_other_models_take_xla_and_say_why_once(tpu, change, reason):
    for _ in range(2):
        assert backend.resolve(None, **MODEL | change) == "xla"
    assert [reason in record.getMessage() for record in tpu.records] == [True]


@pytest.mark.parametrize("op", ["rms_norm", "matmul", "rope_cache", "attention", "sample"])
def test_every_op_has_a_kernel(op):
    assert registry.load(op, "mosaic_tpu").__name__ == f"pallas_kernels.{op}.mosaic_tpu"
