"""`verify` certifies what is deterministic and catches what is not."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import compiled, model_of, with_flipped_weight
from rich.console import Console

from jaxdet import certificates
from jaxdet.engine.step import Step
from jaxdet.testing import write_tiny_model
from jaxdet.verify import Case, verify
from jaxdet.verify.cases import SEGMENTS, long_case
from jaxdet.verify.control import NAMES
from jaxdet.verify.probe import LONG, MODEL_LEN, NEIGHBOURS, ROOM, Probe
from jaxdet.verify.several_steps import STEPS, WORK, several_steps_case
from pallas_kernels.matmul import xla as matmul
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.proven import BASE

WIDE = {"hidden_size": 576, "head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3}


def rendered(report) -> str:
    console = Console(record=True, width=160)
    console.print(report.render())
    return console.export_text()


def test_certifies(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(certificates, "keep", lambda *which, **found: kept.append(found["tiles"]))
    monkeypatch.setattr("jaxdet.verify.described", lambda tiles: "512 rows" if tiles == BASE else "")
    report = verify(write_tiny_model(tmp_path / "tiny", max_position_embeddings=ROOM), progress=False)
    assert report.ok, rendered(report)
    assert {c.promise for c in report.cases} == {"I1", "I2", "I3", "I4"}
    assert {c.name for c in report.control} == set(NAMES.values()) <= {c.name for c in report.cases}
    assert all(c.compared > 10 for c in report.cases)
    assert report.digest in rendered(report)
    report.write_json(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["ok"] and saved["digest"] == report.digest
    assert saved["environment"]["versions"]["jaxlib"]
    assert saved["environment"]["larger_tiles"] == "512 rows" and "larger_tiles: 512 rows" in rendered(report)
    assert kept == ["512 rows"]
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_catches_a_plain_matmul(tmp_path, monkeypatch):
    """Negative control: with XLA's own dots in place of the kernel's, verification fails."""

    def plain(x, packed, n):
        w = matmul.unpack(packed, x.shape[1], n)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    monkeypatch.setattr(matmul, "dot", plain)
    monkeypatch.setenv("JAXDET_CACHE", str(tmp_path / "cache"))
    folder = write_tiny_model(tmp_path / "tiny", **WIDE)
    report = verify(folder, progress=False)
    assert not report.ok
    assert certificates.differing("tiny", "xla", "float32") == sum(c.differing for c in report.cases)
    assert {c.name for c in report.cases if c.differing} >= {NAMES["one_by_one"]}
    assert "NOT deterministic" in rendered(report)
    assert report.control_bites


@pytest.fixture(scope="module")
def one_layer() -> Step:
    return compiled(model_of(num_hidden_layers=1))


def several_steps(step: Step, monkeypatch, fault=None) -> tuple[Case, set]:
    """The case, and (steps, rows, whether any is sampled) of the programs that ran; `fault` changes their arguments."""
    ran, decode = set(), Step.decode

    def noted(self, cache, last_tokens, feed, batch, counts, rows, slots, *, steps):
        ran.add((steps, batch.rows, rows is not None))
        if fault is not None:
            self, counts, rows = fault(self, counts, rows)
        return decode(self, cache, last_tokens, feed, batch, counts, rows, slots, steps=steps)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "decode", noted)
        return several_steps_case(Probe(step)), ran


def test_several_steps_in_one_dispatch_are_compared(one_layer, monkeypatch):
    case, ran = several_steps(one_layer, monkeypatch)
    assert case.differing == 0
    assert ran == {(STEPS, 8, True), (STEPS, 1, False)}
    page = 2 * one_layer.config.num_kv_heads * PAGE_SIZE * one_layer.config.head_dim
    assert case.compared > len(NEIGHBOURS) * len(WORK) * page


def later(rows):
    return rows and dataclasses.replace(rows, position=rows.position + 1)


FAULTS = {
    "a weight's bit": lambda step, counts, rows: (with_flipped_weight(step), counts, rows),
    "steps past the end": lambda step, counts, rows: (
        step,
        np.where(counts, STEPS, 0).astype(np.int32),
        rows,
    ),
    "another position's noise": lambda step, counts, rows: (step, counts, later(rows)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_several_steps_alone_is_seen(one_layer, monkeypatch, fault):
    case, _ = several_steps(one_layer, monkeypatch, FAULTS[fault])
    assert 0 < case.differing < case.compared


def test_a_sequence_longer_than_a_segment_is_compared(one_layer, monkeypatch):
    assert list(long_case(one_layer, MODEL_LEN)) == []  # this backend's segments end within the reference
    monkeypatch.setitem(SEGMENTS, one_layer.backend, 1024)
    assert list(long_case(one_layer, ROOM)) == []  # nor does such a model have two
    (case,) = long_case(one_layer, MODEL_LEN)
    decoded = LONG - 1024 + 32
    assert (case.compared, case.differing) == ((2 * LONG + decoded) * one_layer.config.vocab_size, 0)

    run = Probe.run

    def another_decode(probe, cache, rows):
        if all(row.end - row.start == 1 for row in rows):
            probe.step = with_flipped_weight(one_layer)
        return run(probe, cache, rows)

    monkeypatch.setattr(Probe, "run", another_decode)
    (case,) = long_case(one_layer, MODEL_LEN)
    assert 0 < case.differing <= decoded * one_layer.config.vocab_size


def test_a_case_counts_bits_not_values():
    case = Case("I1", "case")
    case.compare(np.float32([0.0, np.nan, 1.0]), np.float32([0.0, np.nan, 1.0]))
    assert (case.compared, case.differing) == (3, 0)
    case.compare(np.float32([-0.0, 1.0]), np.float32([0.0, np.nextafter(np.float32(1), np.float32(2))]))
    assert (case.compared, case.differing) == (5, 2)
    case.compare(np.float32([1.0]), np.float32([1.0, 2.0]))
    assert (case.compared, case.differing) == (7, 4)


def test_nothing_compared_is_no_success(tmp_path):
    from jaxdet.verify.report import Report

    assert not Report("m", "d", [Case("I1", "empty")], [], {}).ok


def test_model_must_hold_the_reference(tmp_path):
    with pytest.raises(ValueError, match="max_model_len=512"):
        verify(write_tiny_model(tmp_path / "tiny", max_position_embeddings=128), progress=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_certifies_the_demo_model(demo_model):
    report = verify(demo_model, progress=False)
    assert report.ok, rendered(report)
    assert all(c.differing for c in report.control), rendered(report)
