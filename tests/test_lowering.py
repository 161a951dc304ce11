"""Processes that lower programs for an engine: they find what is missing, and nothing depends on them."""

import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from test_lowered_cache import TINY

from jaxdet.engine import lowered_cache, lowering, step
from jaxdet.engine.engine import Engine
from jaxdet.engine.step import Step
from jaxdet.testing import random_model
from pallas_kernels.matmul import tuning_sm90


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lowered_cache, "folder", lambda backend: tmp_path)
    monkeypatch.setattr(lowering, "PLATFORM", "cpu")
    monkeypatch.setattr(lowering, "usable_cpus", lambda: 4)
    return tmp_path


def engine(backend="xla", dtype=jnp.float32, **sizes) -> Engine:
    model = random_model(TINY, dtype=dtype, backend=backend, max_model_len=128)
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "num_pages": 4} | sizes
    return Engine(model, salt="", max_model_len=128, **sizes)


def test_processes_lower_what_the_engine_asks_for(folder, monkeypatch):
    first = engine()
    jobs = first.wanted.jobs(Step.compiler)
    missing = lowering._missing(first.wanted, folder)
    assert 8 <= len(missing) < len(jobs)
    with lowering.beside(first.wanted) as wait:
        for number in range(len(jobs)):
            wait(number)
    assert lowering._missing(first.wanted, folder) == []
    assert len(list(folder.iterdir())) == len(missing)

    def lowered_again(*_):
        raise AssertionError("the engine did what the processes had done")

    with monkeypatch.context() as patched:
        patched.setattr(lowered_cache, "keep", lowered_again)
        jobs[missing[0]]()
        assert first.step_fn.compiled == 1
        with jax.enable_x64(True), pytest.raises(AssertionError, match="had done"):
            jobs[missing[0]]()  # other settings, another program
    with lowering.beside(first.wanted) as wait:
        wait(missing[0])  # nothing is missing: no process, no wait


FAULTS = {
    "ends at once": "pass",
    "ends after a while": "import sys; sys.stdin.buffer.read(9)",
    "hangs": "import time; time.sleep(1e6)",
    "hangs on a program": "import pickle, sys, time; pickle.load(sys.stdin.buffer); time.sleep(1e6)",
}


@pytest.mark.parametrize("fault", [*FAULTS, "can't be started", "can't be written"])
def test_the_engine_does_it_where_they_cannot(folder, monkeypatch, fault):
    started = []
    monkeypatch.setattr(lowering, "PATIENCE_SECONDS", 1)
    if fault == "can't be written":
        monkeypatch.setattr(lowering, "_writable", lambda folder: False)

    def process():
        if fault not in FAULTS:
            raise OSError("no more processes")
        command = [sys.executable, "-c", FAULTS[fault]]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, bufsize=0, **pipes))
        return started[-1]

    monkeypatch.setattr(lowering, "_process", process)
    monkeypatch.setattr(lowering, "WORTH", 1)
    monkeypatch.setattr(step, "KEPT", ("copy", "logprobs"))  # quick to compile
    only = engine()
    monkeypatch.setattr(type(only.wanted), "jobs", _quick(type(only.wanted).jobs))
    only.compile_all()
    assert len(started) == 2 * (fault in FAULTS) and all(process.poll() is not None for process in started)
    assert only.step_fn.compiled == len(only.wanted.jobs(Step.compiler)) > 2
    assert lowering._missing(only.wanted, folder) == []


def _quick(jobs):
    """Those that copy pages and give log-probabilities."""

    def some(wanted, twin):
        return [job for job in jobs(wanted, twin) if job.func.__name__ in ("copy_pages", "logprobs")]

    return some


@pytest.mark.slow
def test_they_lower_hopper_kernels_with_a_drafter(folder, monkeypatch):
    monkeypatch.setattr(lowering, "PLATFORM", "cuda")
    drafter = random_model(TINY, dtype=jnp.bfloat16, backend="mosaic_gpu", max_model_len=128, seed=1)
    both = engine("mosaic_gpu", jnp.bfloat16, drafter=drafter, num_speculative_tokens=1)
    missing = lowering._missing(both.wanted, folder)
    with lowering.beside(both.wanted) as wait:
        for number in missing:
            wait(number)
    assert lowering._missing(both.wanted, folder) == []
    found = [lowered_cache._read(path) for path in folder.iterdir()]
    assert len(found) >= 8
    for exported in found:
        assert exported.platforms == ("cuda",) and "mosaic_gpu_v2" in exported.mlir_module()


def test_a_process_takes_the_tiles_of_the_engines_gpu(folder, monkeypatch):
    work = lowering._Work.of(engine().wanted, folder)._replace(device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(work))))
    assert tuning_sm90.table() is tuning_sm90.TABLES["NVIDIA H200"]
    try:
        lowering.main()
        assert tuning_sm90.table() is tuning_sm90.TABLES["NVIDIA H100"]
    finally:
        tuning_sm90.assume(None)
