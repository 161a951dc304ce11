"""Runs the tests on the CPU, unless `-m gpu` asks for the GPU; XLA_FLAGS stay as they are."""

import gc
import os
from pathlib import Path

import pytest

REFERENCES = Path(__file__).parent / "references"
MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 25_000


def pytest_configure(config):
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["JAX_PLATFORMS"] = "cpu"


@pytest.fixture(autouse=True)
def few_mappings():
    """Drops compiled programs in time: each takes six pieces of memory or more, and Linux maps 65,530 for a process.

    Where it maps no more, XLA ends the process with a segmentation fault.
    """
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax  # not above: it reads JAX_PLATFORMS

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tiny_model() -> Path:
    """A random Llama of 2 layers and 288 tokens, in Hugging Face's layout, without a tokenizer."""
    return REFERENCES / "llama"


@pytest.fixture
def gpu_of(monkeypatch):
    """Makes a Hopper kernel's module believe in so few SMs that a small shape takes several rounds of them."""
    caches = []

    def few(sms: int, module, cached) -> None:
        monkeypatch.setattr(module, "SMS", sms)
        cached.cache_clear()
        caches.append(cached)

    yield few
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def references() -> Path:
    """The folder of transformers' logits; its README says what is in it."""
    return REFERENCES


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The demo model's name, once its file is there; without a network its tests can't run, which CI doesn't accept."""
    from jaxdet.checkpoints import demo  # only now: JAX reads its platform when it is imported

    try:
        demo.fetch_demo_model()
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the demo model could not be fetched: {error}")
    return demo.NAME
