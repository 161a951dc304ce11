"""What a verification found is remembered, said at the next start, and no fingerprint claims otherwise."""

import json
from types import SimpleNamespace

import pytest

from jaxdet import LLM, certificates
from jaxdet.api import fingerprint as fingerprints
from jaxdet.api.fingerprint import fingerprint
from jaxdet.testing import write_tiny_model
from pallas_kernels import backend, compat
from pallas_kernels.proven import BASE, Attention, Dot, Tiles

DOTS = tuple(Dot(64, 64, "float16", rows) for rows in (256, 512, 1024))
ATTENTION = (Attention(4, 2, 16, "float16", None, 30.0),)


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
            return backend.libraries.__wrapped__()

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


@pytest.mark.parametrize(
    ("used", "counts"),
    [
        (Tiles(DOTS[:2], ATTENTION), True),
        (Tiles(DOTS[1:2]), True),  # any may be left out without changing a bit
        (BASE, True),
        (Tiles(DOTS, ATTENTION), False),
        (Tiles(DOTS[:2], (ATTENTION[0]._replace(window=70),)), False),
    ],
)
def test_a_certificate_vouches_for_no_larger_tiles_but_those_proven_then(caplog, monkeypatch, used, counts):
    monkeypatch.setattr(certificates, "TESTED", set())
    which = "model", "xla", "float16"
    tiles = Tiles(DOTS[:2], ATTENTION)
    certificates.keep(*which, compared=10, differing=0, tiles=tiles)
    assert certificates.differing(*which, used) == (0 if counts else None)
    assert certificates.claimed(*which, used) == counts
    assert (said(caplog, *which, used) == "") == counts
    certificates.keep(*which, compared=10, differing=3, tiles=tiles)  # a failure stands for any
    assert certificates.differing(*which, used) == 3


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
        monkeypatch.setattr(certificates, "libraries", lambda now=made_with: now)
        certificates.keep(*which, compared=10, differing=0)
        for now in tried:
            monkeypatch.setattr(certificates, "libraries", lambda now=now: now)
            assert certificates.claimed(*which) == (now == made_with)


def test_versions_are_those_that_the_cuda_plugin_tells(monkeypatch):
    told = {"cublas": 130100, "cuda_runtime": 13000, "cuda_driver": 13020}
    plugin = SimpleNamespace(**{f"{name}_get_version": lambda x=x: x for name, x in told.items()})
    monkeypatch.setattr(compat, "cuda_versions", plugin)
    assert compat.cuda_libraries() == {"cublas": 130100, "runtime": 13000, "driver": 13020}
    monkeypatch.setattr(compat, "cuda_versions", None)  # on a machine without CUDA
    assert compat.cuda_libraries() == {}


def test_the_note_can_be_read(cache, monkeypatch):
    monkeypatch.setattr(certificates, "libraries", lambda: "cuda 13000, cublas 130100")
    certificates.keep("model", "xla", "float16", compared=10, differing=0, tiles=Tiles(DOTS[:1], ATTENTION))
    (path,) = cache.rglob("*.json")
    assert json.loads(path.read_text()) == {
        "model": "model",
        "libraries": "cuda 13000, cublas 130100",
        "compared": 10,
        "differing": 0,
        "larger_tiles": {
            "dots": [[64, 64, "float16", 256]],
            "attention": [[4, 2, 16, "float16", None, 30.0]],
        },
    }


OLD = '{"model": "model", "compared": 10, "differing": 0, "larger_tiles": "64 × 64 float32 in 512 rows"}'


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"differing": null}', '{"differing": 0}', OLD, "\x00"])
def test_a_damaged_or_older_note_is_none(cache, content):
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
    llm.engine.step_fn.tiles = Tiles(DOTS)  # none of them was proven when it was verified
    assert len({claimed, fingerprint(llm), fingerprint(llm)}) == 3
    llm.engine.step_fn.tiles = BASE
    monkeypatch.setattr(fingerprints, "libraries", lambda: "another cuBLAS")
    assert fingerprint(llm) == fingerprint(llm) != claimed
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "another machine"))
    assert len({claimed, fingerprint(llm), fingerprint(llm)}) == 3


def test_an_engine_is_asked_for_its_own_tiles(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(certificates, "TESTED", set())
    monkeypatch.setattr("jaxdet.engine.engine.prove", lambda *_: Tiles(DOTS))
    folder = write_tiny_model(tmp_path / "tiny")
    for proven, asked in ((DOTS, False), (DOTS[:2], True)):
        certificates.keep("tiny", "xla", "float32", compared=10, differing=0, tiles=Tiles(proven))
        caplog.clear()
        LLM(folder)
        assert ("jaxdet verify tiny" in caplog.text) == asked
