"""How many pages are planned beside the weights and what a step needs."""

import jax
import pytest

from jaxdet.engine.buckets import Buckets
from jaxdet.engine.memory import page_bytes, plan_pages, step_bytes
from jaxdet.models.registry import family_of
from jaxdet.testing import QWEN3_8B

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
    return plan_pages(CONFIG, BUCKETS, 2, table=table, wanted=wanted, utilization=utilization)


def test_a_page_holds_keys_and_values_of_all_layers():
    assert page_bytes(CONFIG, 2) == 2 * 36 * 8 * 128 * 128 * 2


@pytest.mark.parametrize("limit", [40 * GB, 80 * GB, 140 * GB])
def test_pages_fill_what_is_left(monkeypatch, limit):
    pages, size = plan(monkeypatch, limit), page_bytes(CONFIG, 2)
    room = 0.9 * limit - 16 * GB - step_bytes(CONFIG, BUCKETS, 2, 6)
    assert pages * size <= room and pages >= 63 / 64 * (room / size) - 2


def test_no_more_pages_than_can_be_in_use(monkeypatch):
    assert plan(monkeypatch, 140 * GB, wanted=100) == 101


def test_decodes_partial_results_are_planned(monkeypatch):
    """32k tokens are 64 segments: for 256 rows and 32 heads 273 MB of them, at 512 tokens none."""
    short, long = (step_bytes(CONFIG, BUCKETS, 2, table) for table in (4, 256))
    assert long - short == 256 * 64 * 32 * (128 + 2) * 4
    assert plan(monkeypatch, 80 * GB, table=256) < plan(monkeypatch, 80 * GB, table=4)


def test_too_little_memory_says_what_to_change(monkeypatch):
    with pytest.raises(ValueError, match="lower max_model_len, max_num_seqs or max_num_batched_tokens"):
        plan(monkeypatch, 20 * GB, table=66)


def test_a_device_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(
        jax, "local_devices", lambda: [type("Cpu", (), {"memory_stats": lambda self: None})()]
    )
    pages = plan_pages(CONFIG, BUCKETS, 4, table=6, wanted=10**6, utilization=0.9)
    assert pages == 2**30 // page_bytes(CONFIG, 4)
