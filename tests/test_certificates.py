"""What a verification found is remembered, said at the next start, and no fingerprint claims otherwise."""

import json

import pytest

from jaxdet import LLM, certificates
from jaxdet.api.fingerprint import fingerprint
from jaxdet.testing import write_tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def said(caplog, *which):
    caplog.clear()
    certificates.say(*which)
    return caplog.text


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


def test_the_note_says_what_ran_in_larger_tiles(cache):
    certificates.keep("model", "xla", "float32", compared=10, differing=0, tiles="64 × 64 in 512 rows")
    (path,) = cache.rglob("*.json")
    assert json.loads(path.read_text())["larger_tiles"] == "64 × 64 in 512 rows"


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
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "another machine"))
    assert len({claimed, fingerprint(llm), fingerprint(llm)}) == 3
