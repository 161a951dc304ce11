"""I4: new processes give the same bits, whatever the compilation cache holds and the user has set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdet.testing import write_tiny_model

SCRIPT = Path(__file__).parent / "digests.py"
USERS = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "XLA_FLAGS": "--xla_allow_excess_precision=false --xla_force_host_platform_device_count=2",
    "PYTHONHASHSEED": "7",
}


def start(folder: Path, cache: Path, **environment: str) -> dict[str, str]:
    """The digests from a new process, which must not print a warning."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "JAXDET_"))}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        env=clean | {"JAX_PLATFORMS": "cpu", "JAXDET_CACHE": str(cache)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(tmp_path_factory, cache):
    """(model folder, digests from a process that compiled everything)."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "llama")
    return folder, start(folder, cache)


def test_restart(first, cache):
    """From the compilation cache, and compiled anew under a user's own settings."""
    folder, expected = first
    models = {p: p.stat().st_mtime_ns for p in cache.rglob("jit__model*-cache")}
    assert models, "nothing was kept for the next process"
    assert start(folder, cache) == expected
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("jit__model*-cache")} == models, "it compiled again"
    assert start(folder, cache, **USERS) == expected


def test_control_other_weights(first, tmp_path, cache):
    """Negative control: the digests tell one model from another."""
    _, expected = first
    found = start(write_tiny_model(tmp_path / "other", seed=1), cache)
    assert [k for k in expected if expected[k] == found[k]] == ["rope_table"]
