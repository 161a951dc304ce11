"""How many pages are planned beside the weights and what a step needs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxdet.engine.buckets import Buckets
from jaxdet.engine.memory import page_bytes, plan_pages, step_bytes
from jaxdet.models.registry import family_of
from jaxdet.testing import QWEN3_8B
from pallas_kernels.attention import decode_sm90

CONFIG = family_of(QWEN3_8B).read_config(QWEN3_8B)
BUCKETS = Buckets(256, 4096, 32)
GB = 10**9


class Device:
    """One with so much memory."""

    def __init__(self, limit: int, used: int = 0):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


def plan(monkeypatch, limit: int, *, used=16 * GB, table=6, wanted=10**6, utilization=0.9) -> int:
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(limit, used)])
    return plan_pages(CONFIG, BUCKETS, 2, "mosaic_gpu", table=table, wanted=wanted, utilization=utilization)


def test_a_page_holds_keys_and_values_of_all_layers():
    assert page_bytes(CONFIG, 2) == 2 * 36 * 8 * 128 * 128 * 2


@pytest.mark.parametrize("limit", [40 * GB, 80 * GB, 140 * GB])
def test_pages_fill_what_is_left(monkeypatch, limit):
    pages, size = plan(monkeypatch, limit), page_bytes(CONFIG, 2)
    room = 0.9 * limit - 16 * GB - step_bytes(CONFIG, BUCKETS, 2, 6, "mosaic_gpu")
    assert pages * size <= room and pages >= 63 / 64 * (room / size) - 2


def test_no_more_pages_than_can_be_in_use(monkeypatch):
    assert plan(monkeypatch, 140 * GB, wanted=100) == 101


@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 8, 128), (9, 3, 64), (8, 4, 256)])
def test_decodes_partial_results_are_planned(monkeypatch, heads, kv_heads, dim):
    """They are what the kernel gives beside its result."""
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((256, 256), (256,))]
    pool = of(300, kv_heads, 128, dim)
    decode = functools.partial(decode_sm90.decode, scale=0.1, window=None, soft_cap=None)
    traced = jax.make_jaxpr(decode)(of(256, heads, dim), pool, pool, *numbers)
    results: list[list[Any]] = [[x.aval for x in equation.outvars] for equation in traced.eqns]
    (parts,) = [found[1:] for found in results if len(found) == 4 and found[1].ndim == 5]
    wanted = sum(x.size * x.dtype.itemsize for x in parts)
    assert 256 * decode_sm90.part_bytes(heads, kv_heads, dim, 256 * 128) == wanted > 0
    assert decode_sm90.part_bytes(heads, kv_heads, dim, 512) == 0
    if dim == 128:
        short, long = (step_bytes(CONFIG, BUCKETS, 2, table, "mosaic_gpu") for table in (4, 256))
        assert long - short == wanted
        assert plan(monkeypatch, 80 * GB, table=1024) < plan(monkeypatch, 80 * GB, table=4)
        short, long = (step_bytes(CONFIG, BUCKETS, 2, table, "xla") for table in (4, 256))
        assert short == long  # no other kernel keeps any


def test_too_little_memory_says_what_to_change(monkeypatch):
    with pytest.raises(ValueError, match="lower max_model_len, max_num_seqs or max_num_batched_tokens"):
        plan(monkeypatch, 20 * GB, table=66)


def test_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(
        jax, "local_devices", lambda: [type("Cpu", (), {"memory_stats": lambda self: None})()]
    )
    pages = plan_pages(CONFIG, BUCKETS, 4, "xla", table=6, wanted=10**6, utilization=0.9)
    assert pages == 2**30 // page_bytes(CONFIG, 4)


def test_the_xla_backends_float32_sums_are_planned():
    """A product's result is in memory before it is rounded, beside what it is made of."""
    assert step_bytes(CONFIG, BUCKETS, 2, 6, "xla") > 4096 * (2 * 12288 * 4 + 3 * 4096 * 2)
