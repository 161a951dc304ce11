"""What a verification found is remembered, said at the next start, and no fingerprint claims otherwise."""

import json
from types import SimpleNamespace

import pytest

from jaxdet import LLM, certificates
from jaxdet.api import fingerprint as fingerprints
from jaxdet.api.fingerprint import fingerprint
from jaxdet.testing import write_tiny_model
from pallas_kernels import backend, compat


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def said(caplog, *which):
    caplog.clear()
    certificates.say(*which)
    return caplog.text


@pytest.fixture
def described(monkeypatch):
    """`libraries()` of a device whose client JAX describes so, with such CUDA libraries."""

    def libraries(platform, version, **cuda):
        client = SimpleNamespace(platform_version=version)
        with monkeypatch.context() as patched:
            patched.setattr("jax.devices", lambda: [SimpleNamespace(platform=platform, client=client)])
            patched.setattr(backend, "cuda_libraries", lambda: cuda)
            return backend.libraries.__wrapped__("xla")

    return libraries


def test_a_failed_verification_is_said_and_a_later_success_takes_it_back(caplog):
    which = "model", "xla", "float32"
    assert certificates.differing(*which) is None and said(caplog, *which) == ""
    certificates.keep(*which, compared=10, differing=3)
    assert "NOT claimed" in said(caplog, *which) and "3 differing values" in caplog.text
    assert said(caplog, "another", "xla", "float32") == said(caplog, "model", "xla", "bfloat16") == ""
    certificates.keep(*which, compared=10, differing=0)
    assert said(caplog, *which) == ""


def test_a_device_that_nobody_tested_asks_for_a_verification(caplog, monkeypatch):
    monkeypatch.setattr(certificates, "TESTED", set())
    assert "jaxdet verify model --dtype float16" in said(caplog, "model", "xla", "float16")
    certificates.keep("model", "xla", "float16", compared=10, differing=0)
    assert said(caplog, "model", "xla", "float16") == ""


def test_another_library_or_driver_asks_for_another_verification(described, monkeypatch):
    monkeypatch.setattr(certificates, "TESTED", set())
    gpu = {"cublas": 130100, "runtime": 13000, "driver": 13000}
    tried = [
        described("gpu", "cuda 13000", **gpu),
        *(described("gpu", "cuda 13000", **gpu | {name: gpu[name] + 1}) for name in gpu),
        described("gpu", "cuda 13010", **gpu),
        described("gpu", "rocm 60300"),
        described("tpu", "libtpu of Monday"),
        described("tpu", "libtpu of Tuesday"),
        described("cpu", "cpu"),
    ]
    assert tried[-1] == "" and len(set(tried)) == len(tried)
    for i, made_with in enumerate(tried):
        which = f"model {i}", "xla", "float16"
        monkeypatch.setattr(certificates, "libraries", lambda _, now=made_with: now)
        certificates.keep(*which, compared=10, differing=0)
        for now in tried:
            monkeypatch.setattr(certificates, "libraries", lambda _, now=now: now)
            assert certificates.claimed(*which) == (now == made_with)


def test_a_failure_stands_for_any_library(monkeypatch, caplog):
    which = "model", "xla", "float32"
    certificates.keep(*which, compared=10, differing=3)
    monkeypatch.setattr(certificates, "libraries", lambda _: "another driver")
    assert certificates.differing(*which) == 3 and not certificates.claimed(*which)
    assert "NOT claimed" in said(caplog, *which)
    certificates.keep(*which, compared=10, differing=0)
    assert certificates.claimed(*which)


def test_hoppers_own_kernels_come_from_no_library():
    assert backend.libraries("mosaic_gpu") == ""


def test_versions_are_those_that_the_cuda_plugin_tells(monkeypatch):
    told = {"cublas": 130100, "cuda_runtime": 13000, "cuda_driver": 13020}
    plugin = SimpleNamespace(**{f"{name}_get_version": lambda x=x: x for name, x in told.items()})
    monkeypatch.setattr(compat, "cuda_versions", plugin)
    assert compat.cuda_libraries() == {"cublas": 130100, "runtime": 13000, "driver": 13020}
    monkeypatch.setattr(compat, "cuda_versions", None)  # on a machine without CUDA
    assert compat.cuda_libraries() == {}


def test_the_note_can_be_read(cache, monkeypatch):
    monkeypatch.setattr(certificates, "libraries", lambda _: "cuda 13000, cublas 130100")
    certificates.keep(
        "model", "xla", "float16", compared=10, differing=0, tiles="64 × 64 float16 in 256 rows"
    )
    (path,) = cache.rglob("*.json")
    assert json.loads(path.read_text()) == {
        "model": "model",
        "libraries": "cuda 13000, cublas 130100",
        "compared": 10,
        "differing": 0,
        "larger_tiles": "64 × 64 float16 in 256 rows",
    }


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"differing": null}', "\x00"])
def test_a_damaged_note_is_none(cache, content):
    certificates.keep("model", "xla", "float32", compared=10, differing=3)
    (path,) = cache.rglob("*.json")
    path.write_text(content)
    assert certificates.differing("model", "xla", "float32") is None


def test_no_fingerprint_where_bits_differ_or_nobody_looked(tmp_path, monkeypatch, caplog):
    llm = LLM(write_tiny_model(tmp_path / "tiny"))
    claimed = fingerprint(llm)
    assert claimed == fingerprint(llm)
    certificates.keep(llm.name, "xla", llm.dtype, compared=10, differing=3)
    assert len({claimed, fingerprint(llm), fingerprint(llm)}) == 3
    LLM(tmp_path / "tiny")
    assert "NOT claimed" in caplog.text
    certificates.keep(llm.name, "xla", llm.dtype, compared=10, differing=0)
    assert fingerprint(llm) == claimed
    monkeypatch.setattr(certificates, "TESTED", set())
    assert fingerprint(llm) == claimed
    monkeypatch.setattr(fingerprints, "libraries", lambda _: "another cuBLAS")
    assert fingerprint(llm) == fingerprint(llm) != claimed
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "another machine"))
    assert len({claimed, fingerprint(llm), fingerprint(llm)}) == 3
