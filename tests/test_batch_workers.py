"""What a Ray worker does, without Ray: how lines are shared out, and one engine for several calls at once."""

import threading
import warnings

import pyarrow as pa
import pytest
from batches import SETTINGS, mixed, write

from jaxdet.batch.engine import BatchEngine
from jaxdet.batch.request import Requests
from jaxdet.batch.source import JsonLines, Line
from jaxdet.llm import LLM
from jaxdet.testing import write_tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from jaxdet.batch import cluster


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    llm = LLM(folder, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512)
    requests = Requests(llm, "tiny", SETTINGS.defaults)
    return BatchEngine(llm, requests), requests.fingerprint


@pytest.fixture
def lines(tmp_path) -> list[Line]:
    source = JsonLines(write(tmp_path / "in.jsonl", [*mixed(24), b"{bad\n"]))
    return list(source.read(source.slices[0]))


@pytest.fixture
def worker(engine, monkeypatch):
    monkeypatch.setattr(cluster, "make_engine", lambda *_, **__: engine)
    return cluster._Worker(SETTINGS, {})


def table(lines: list[Line]) -> pa.Table:
    return pa.Table.from_pylist([line._asdict() for line in lines], cluster.LINE)


def test_calls_share_an_engine(worker, engine, lines):
    """Blocks that overlap, in threads of their own, get what each line gets alone."""
    expected = {result.number: result for result in engine[0].answers(lines)}
    blocks, found = [lines[0:9], lines[5:17], lines[16:], lines[::-1]], {}

    def call(place: int) -> None:
        found[place] = worker(table(blocks[place])).to_pylist()

    for _ in range(2):
        threads = [threading.Thread(target=call, args=(place,)) for place in range(len(blocks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for place, block in enumerate(blocks):
            rows = [
                expected[line.number]._asdict() | {"fingerprint": engine[1], "trouble": None}
                for line in block
            ]
            assert found[place] == rows
    assert sum(row["good"] for row in found[3]) == 24


def test_what_goes_wrong_is_told(engine, worker, lines, monkeypatch):
    def fail(llm):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "step", fail)
        for _ in range(2):  # it stays so
            (row,) = worker(table(lines[:3])).to_pylist()
            assert row["trouble"] == "MemoryError: no room"
    monkeypatch.setattr(cluster, "make_engine", lambda *_, **__: 1 / 0)
    (row,) = cluster._Worker(SETTINGS, {})(table(lines)).to_pylist()
    assert row["trouble"] == "ZeroDivisionError: division by zero"
    assert len(list(engine[0].answers(lines))) == 25  # the engine itself is as it was


@pytest.mark.parametrize(("count", "workers"), [(1, 8), (7, 2), (1000, 1), (3000, 4)])
def test_every_missing_line_is_in_one_chunk(tmp_path, count, workers):
    source = JsonLines(write(tmp_path / "in.jsonl", [b"%d\n" % (i + 1) for i in range(count)]))
    for done in (set(), set(range(3, count, 5)), set(range(300, 600))):
        chunks = cluster._chunks(source, done.__contains__, workers)
        light = cluster._Lines(source, chunks)
        tasks = light.get_read_tasks(-1)
        found = [row for task in tasks for block in task() for row in block.to_pylist()]
        assert [row["number"] for row in found] == [n for n in range(1, count + 1) if n not in done]
        assert all(int(row["data"]) == row["number"] for row in found)
        assert max(len(numbers) for _, numbers in chunks) <= 256
        assert len(chunks) >= min(workers, count - len(done & set(range(1, count + 1))))
        assert source.slices and not light._source.slices
