"""The script behind the curves over batch and context runs from end to end, at its smallest."""

import json
import time

import growth
import pytest


@pytest.mark.slow
def test_growth(tmp_path):
    growth.main(tmp_path, small=True)
    report, sizes = json.loads((tmp_path / "growth.json").read_text()), growth.SMALL
    assert [(row["batch"], row["context"]) for row in report["by batch"]] == [
        (batch, sizes.context) for batch in sizes.batches
    ]
    assert [(row["batch"], row["context"]) for row in report["by context"]] == [
        (batch, context) for context in sizes.contexts for batch in (1, sizes.wide)
    ]
    for row in report["by batch"] + report["by context"]:
        assert 0 < row["tokens/s"] < row["limit"]
        assert 0 < row["host CPU ms"] < row["step ms"]
        assert row["host overhead"] == pytest.approx(1 - row["device ms"] / row["step ms"])
        assert len(row["rounds"]) == (growth.ROUNDS if row["batch"] == 1 else 1)
    # A batch costs one program, prefixes are found: besides there are a prefill, the largest step, a draw after each.
    assert report["compiled programs"] == len(sizes.batches) + 4
    memory = report["memory"]
    parts = memory["weights GB"] + memory["cache GB"] + memory["kept free for steps GB"]
    assert memory["plan GB"] == pytest.approx(parts) and memory["largest program's own GB"] > 0
    assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 8])
def test_a_slow_host_shows(monkeypatch, steps):
    """The control of a small overhead, for both kinds of dispatch: a host that is slower than the device is seen."""
    monkeypatch.setattr(growth, "steps_at_once", lambda _: steps)
    bench = growth.Bench(growth.SMALL)
    schedule = bench.engine.scheduler.schedule

    def slow(*arguments):
        time.sleep(0.02 * steps)  # a step's CPU "device" takes milliseconds, on a busy machine several
        return schedule(*arguments)

    monkeypatch.setattr(bench.engine.scheduler, "schedule", slow)
    row = bench.row([[]], 128)
    assert row["step ms"] >= 20 and row["host overhead"] > 0.5
    assert row["host CPU ms"] < row["step ms"] / 2  # it slept
