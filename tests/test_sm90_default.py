"""Which backend None means, on devices that are not here."""

import logging
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend

MODEL = {"dtype": jnp.bfloat16, "head_dim": 128, "num_q_heads": 32, "num_kv_heads": 8}


@pytest.fixture
def gpu(monkeypatch, caplog):
    """Pretends that the machine has a GPU of the given compute capability; returns the log."""

    def pretend(capability: str):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        backend._say_once.cache_clear()
        caplog.set_level(logging.WARNING)
        return caplog

    return pretend


def test_hopper_takes_its_own_kernels_without_a_word(gpu):
    log = gpu("9.0")
    assert backend.resolve(None, **MODEL) == "mosaic_gpu"
    assert not log.records


@pytest.mark.parametrize(
    ("capability", "change", "reason"),
    [
        ("8.9", {}, "compute capability 8.9"),
        ("9.0", {"dtype": jnp.float32}, "dtype float32"),
        ("9.0", {"head_dim": 80}, "head_dim 80"),
        ("9.0", {"num_q_heads": 80, "num_kv_heads": 1}, "80 query heads a KV head"),
    ],
)
def test_other_models_and_gpus_take_xla_and_say_why_once(gpu, capability, change, reason):
    log = gpu(capability)
    for _ in range(3):
        assert backend.resolve(None, **MODEL | change) == "xla"
    assert [reason in record.getMessage() for record in log.records] == [True]


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("7.5", "float16"), ("8.0", "bfloat16"), ("12.0", "bfloat16"), ("gfx942", "bfloat16")],
)
def test_half_precision_is_what_the_gpu_multiplies(gpu, capability, dtype):
    assert backend.default_dtype() == "float32"
    gpu(capability)
    assert backend.default_dtype() == dtype


def test_a_cpu_takes_xla_and_a_named_backend_is_kept():
    assert backend.resolve(None, **MODEL) == "xla"
    assert backend.resolve("mosaic_gpu") == "mosaic_gpu"
    with pytest.raises(ValueError, match="is unknown; use one of"):
        backend.resolve("triton")
