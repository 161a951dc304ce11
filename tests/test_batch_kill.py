"""`jaxdet batch` is killed at random moments and started again: nothing is lost and nothing comes twice."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batches import differing, mixed, write

from jaxdet.testing import write_tiny_model

KILLS = 20
LINES = 120
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def job(tmp_path):
    """The command that answers a file."""
    tiny = write_tiny_model(tmp_path / "tiny")

    def command(source: Path, out: Path) -> list[str]:
        jaxdet = Path(sys.executable).parent / "jaxdet"
        options = ("-m", tiny, "--max-model-len", 512, "--max-num-seqs", 8)
        return [str(x) for x in (jaxdet, "batch", source, out, *options)]

    return command


def results(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_suffix(".errors.jsonl").read_bytes()


def test_killed_at_random_moments(job, tmp_path):
    source = write(tmp_path / "in.jsonl", [*mixed(LINES), b"{bad\n"])
    other = write(tmp_path / "other.jsonl", mixed(LINES, seed=5000))
    others, whole = tmp_path / "others.jsonl", tmp_path / "whole.jsonl"
    assert subprocess.run(job(other, others), check=False).returncode == 0  # compiles, too
    began = time.monotonic()
    assert subprocess.run(job(source, whole), check=False).returncode == 3
    seconds, expected = time.monotonic() - began, results(whole)
    records = sum(map(len, expected))
    assert differing(others.read_bytes(), expected[0]) > LINES / 2  # the control
    choose = random.Random(20)
    kills, finished, moments = 0, 0, []
    while kills < KILLS or finished < 4:
        out = tmp_path / f"out{finished}.jsonl"
        folder = out.with_name(f"{out.name}.journal")
        place = choose.choice(["time", "records", "records", "records", "output", "end", "receipt"])
        limit = choose.random()
        process = subprocess.Popen(job(source, out), stderr=subprocess.PIPE, text=True)
        started = time.monotonic()

        def reached(folder=folder, out=out, place=place, limit=limit, started=started) -> bool:
            if place == "time":
                return time.monotonic() - started > limit * seconds
            if place == "records":
                file = folder / "records"
                return file.exists() and file.stat().st_size > limit * records
            return {"output": folder / "output", "end": out, "receipt": folder / "done.json"}[place].exists()

        while process.poll() is None and not (kills < KILLS and reached()):
            time.sleep(0.0002)
        process.kill()
        said = process.communicate()[1]
        if process.returncode == -9:
            kills += 1
            moments.append(place)
            continue
        assert process.returncode == 3, said
        assert results(out) == expected
        assert sorted(p.name for p in folder.iterdir()) == ["done.json", "lock"]
        finished += 1
    assert len(set(moments)) == 5
