"""Batch runs: one file in, the same bytes out, whatever the batch size and wherever the run was stopped."""

import dataclasses
import json
import os
import random
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import CHAT, SETTINGS, Run, differing, mixed, openai_line, read, texts, write
from tqdm import tqdm

from jaxdet.batch import output as output_files
from jaxdet.batch import run as batch_run
from jaxdet.batch import source as sources
from jaxdet.batch.duplicates import _custom_id
from jaxdet.batch.engine import BatchEngine
from jaxdet.batch.journal import Journal, run_of
from jaxdet.batch.request import Requests, Result
from jaxdet.batch.run import Interrupted
from jaxdet.cli import main
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import write_tiny_model

BAD = [
    b"{not json\n",
    b'{"prompt": "\xff\xfe"}\n',
    b"[1, 2]\n",
    b'{"prompt": NaN}\n',
    b"[" * 100_000 + b"\n",
    {"prompt": ""},
    {"prompt": "x", "id": "odd", "beam_width": 3},
    {"prompt": "x", "temperature": -1, "id": 7},
    {"prompt": ["two", "texts"]},
    {"prompt": "x" * 600},
    {"prompt": "\ud800"},
    {"prompt": [1, 2, 100_000]},
    {"prompt": "x", "stream": True},
    {"prompt": "x", "model": "another"},
    openai_line("stream", CHAT, messages=[{"role": "user", "content": "x"}], stream=True),
    openai_line("role", CHAT, messages=[{"role": "poet", "content": "x"}]),
    openai_line("url", "/v1/embeddings", input="x"),
    {"custom_id": "no body", "method": "POST", "url": CHAT},
]
SAYS = [
    "no JSON: Expecting property name enclosed in double quotes at character 2",
    "no UTF-8 (byte 13)",
    "no JSON object",
    "no number NaN",
    "nested too deeply",
    "prompt",
    "beam_width: Extra inputs are not permitted",
    "temperature",
    "prompt must be one text or its token ids",
    "max_model_len is 512",
    "unable to parse raw data as a unicode string",
    "prompt_token_ids holds 100000",
    "stream is for servers",
    "model 'another' isn't served here",
    "stream is for servers",
    "messages.0.role",
    "url",
    "body: Field required",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=512)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    lines = mixed(36)
    lines[5:5] = [b"\n", b"  \n", b"{bad\n"]
    return write(tmp_path_factory.mktemp("input") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def expected(llm, source, tmp_path_factory):
    """What a run gives that nobody disturbs."""
    run = Run(llm, source, tmp_path_factory.mktemp("expected"))
    assert run().requests == 37 and run.results == 37
    return run.bytes


@pytest.fixture
def run(llm, source, tmp_path):
    return Run(llm, source, tmp_path)


@pytest.mark.parametrize("batch_size", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_batch_size(folder, source, expected, tmp_path, batch_size):
    llm = LLM(folder, max_num_seqs=batch_size, max_num_batched_tokens=32, max_model_len=512)
    run = Run(llm, source, tmp_path)
    run()
    assert run.bytes == expected
    assert (len(read(run.output)), len(read(run.errors))) == (36, 1)


def test_other_seeds_give_other_answers(llm, expected, tmp_path):
    run = Run(llm, write(tmp_path / "in.jsonl", mixed(36, seed=2000)), tmp_path / "out")
    run()
    assert differing(run.bytes[0], expected[0]) > 30


def test_answers_are_the_engines_own(llm, expected):
    answers = [json.loads(line) for line in expected[0].splitlines()]
    for line, answer in zip(mixed(36), answers, strict=True):
        body = line.get("body", line)
        params = SamplingParams(
            max_tokens=body["max_tokens"], temperature=0.9, seed=body["seed"], n=body.get("n", 1),
            stop=body.get("stop", ()), logprobs=body.get("logprobs"),
        )  # fmt: skip
        if "messages" in body:
            outputs = llm.chat(body["messages"], params, use_tqdm=False)
        elif "id" in line and isinstance(line["prompt"], str):
            outputs = llm.generate([llm.user_prompt(line["prompt"])], params, use_tqdm=False)
        else:
            outputs = llm.generate(body["prompt"], params, use_tqdm=False)
        assert texts(answer) == [c.text for o in outputs for c in o.outputs]
        assert answer.get("custom_id", answer["id"]) == line.get("custom_id", line.get("id"))
    logprobs = answers[2]["response"]["body"]["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == mixed(3)[2]["body"]["max_tokens"]
    assert [a["line"] for a in answers if "line" in a][:4] == [1, 4, 5, 11]  # blank and bad lines count
    ids = [a["response"]["request_id"] for a in answers if "response" in a]
    assert len(set(ids)) == len(ids) == 18


def test_bad_lines(llm, tmp_path):
    good = {"prompt": "fine"}
    run = Run(llm, write(tmp_path / "in.jsonl", [x for bad in BAD for x in (bad, good)]), tmp_path)
    found = run()
    assert (found.requests, found.failed) == (2 * len(BAD), len(BAD))
    errors = read(run.errors)
    assert [e["line"] for e in errors] == list(range(1, 2 * len(BAD), 2))
    for error, says in zip(errors, SAYS, strict=True):
        assert says in error["error"]["message"], error
        assert "\n" not in error["error"]["message"]
    ids = ["odd", 7, "stream", "role", "url", "no body"]
    assert [e["id"] for e in errors if e["id"] is not None] == ids
    assert len({tuple(texts(a)) for a in read(run.output)}) == 1


def test_a_custom_id_is_one_lines(llm, tmp_path):
    """Whichever lines were answered before, and whatever the other format calls its own."""
    again = openai_line("chat 1", CHAT, messages=[{"role": "user", "content": "again"}])
    wrong, after = openai_line("wrong", "/v1/embeddings"), openai_line("wrong", "/v1/completions", prompt="x")
    bom = b"\xef\xbb\xbf" + json.dumps(again).encode() + b"\n"
    own = {"prompt": "x", "id": "chat 1"}
    lines = [
        *mixed(6),
        b"\n",
        again,
        wrong,
        own,
        own,
        after,
        bom,
        again | {"method": "GET"},
        b'{"custom_id"\n',
    ]
    run = Run(llm, write(tmp_path / "in.jsonl", lines), tmp_path / "run")
    found = run()
    assert (found.requests, found.failed, run.results) == (14, 6, 10)
    errors = read(run.errors)
    told = {e["line"]: (e["id"], e["error"]["message"].split(";")[0], e["error"]["code"]) for e in errors}
    twin = ("chat 1", "custom_id: line 2 has the same", "duplicate_custom_id")
    assert told.pop(15)[0] is None and told.pop(9)[2] is None
    assert told == {8: twin, 12: ("wrong", "custom_id: line 9 has the same", twin[2]), 13: twin, 14: twin}
    stopped = Run(llm, run.source, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped(stop_after=3)
    assert stopped().answered == 7
    assert stopped.bytes == run.bytes
    rows = _complete([line | {"body": json.dumps(line["body"])} for line in (again, after, again)])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    table = Run(llm, tmp_path / "in.parquet", tmp_path / "table")
    table()
    assert [e["line"] for e in read(table.errors)] == [3] and len(read(table.output)) == 2


def test_lines_that_are_too_long(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr("jaxdet.batch.request.MAX_LINE_BYTES", 2**20)
    long = b'{"prompt": "' + b"x" * 3 * 2**20 + b'"}\n'
    run = Run(llm, write(tmp_path / "in.jsonl", [{"prompt": "a"}, long, b" " * 2**21, b"\n"]), tmp_path)
    assert (run().requests, [e["line"] for e in read(run.errors)]) == (3, [2, 3])
    assert "more than 1 MiB" in read(run.errors)[0]["error"]["message"]


def test_slices_hold_every_line(tmp_path):
    lines = [b"\n" if i % 5 == 0 else b"%d\n" % i for i in range(1, 1000)]
    source = sources.JsonLines(write(tmp_path / "in.jsonl", [*lines, b"1000"]))
    found = [line for part in source.slices for line in source.read(part)]
    assert [line.number for line in found] == [i for i in range(1, 1001) if i % 5 or i == 1000]
    assert all(int(line.data) == line.number for line in found)
    assert (source.requests, source.last, len(source.slices)) == (801, 1000, 4)


def test_lines_are_read_when_there_is_room(llm):
    """However long the input: what is read ahead is bounded, and the engine is never idle before the end."""
    reads = 0

    def lines():
        nonlocal reads
        for number in range(1, 101):
            reads += 1
            yield sources.Line(number, b'{"prompt": "ab", "max_tokens": %d}' % (1 + number % 7))

    engine = BatchEngine(llm, Requests(llm, "tiny", SETTINGS.defaults))
    done = 0
    for _ in engine.answers(lines()):
        done += 1
        assert reads - done <= 16
    assert done == 100 and engine.idle


@pytest.mark.parametrize("stops", [[0], [1], [11, 3, 20], [36]])
def test_stopped_and_resumed(run, expected, stops):
    done = 0
    for stop in stops:
        with pytest.raises(Interrupted, match=f"stopped after {done + stop} of 37 lines"):
            run(stop_after=stop)
        done += stop
        assert not run.output.exists()
    assert run().answered == run.results == 37 - done
    assert run.bytes == expected
    assert not run.llm.engine.has_work


def test_the_bar_goes_on_where_it_was(run, monkeypatch, capsys):
    monkeypatch.setattr(
        batch_run, "tqdm", lambda **options: tqdm(**options | {"disable": False, "mininterval": 0})
    )
    with pytest.raises(Interrupted):
        run(stop_after=20)
    first = capsys.readouterr().err
    assert "0/37 [" in first and "20/37 [" in first and "21/37 [" not in first
    run()
    second = capsys.readouterr().err
    assert "20/37 [" in second and "37/37 [" in second and "19/37 [" not in second
    assert re.search(r" [\d,]+ tokens/s\]", second)


def test_a_torn_tail_is_forgotten(run, expected):
    with pytest.raises(Interrupted):
        run(stop_after=20)
    records = (run.journal / "records").read_bytes()
    choose = random.Random(5)
    for cut in [len(records) - 1, 0, 7, 20, *choose.choices(range(len(records)), k=5)]:
        (run.journal / "records").write_bytes(records[:cut])
        run()
        assert run.results >= 17
        assert run.bytes == expected
        run.output.unlink()
        run.errors.unlink()
    damaged = bytearray(records)
    damaged[len(records) // 2] ^= 1
    (run.journal / "records").write_bytes(damaged)
    run()
    assert 37 > run.results > 17
    assert run.bytes == expected


@pytest.mark.parametrize("where", ["errors", "output", "receipt", "cleaning"])
def test_a_crash_at_the_end(run, expected, monkeypatch, where):
    """Whichever step of the end is the last one, the same command finishes it without the engine's help."""

    def crash(*_, **__):
        raise RuntimeError("a crash")

    replace, unlink, replaced = os.replace, Path.unlink, []

    def some(old, new):
        if len(replaced) == ("errors", "output").index(where):
            crash()
        replaced.append(new)
        replace(old, new)

    def cleaning(path, **options):
        return crash() if (run.journal / "done.json").exists() else unlink(path, **options)

    with monkeypatch.context() as patch:
        if where == "receipt":
            patch.setattr(batch_run, "_write_receipt", crash)
        elif where == "cleaning":
            patch.setattr(Path, "unlink", cleaning)
        else:
            patch.setattr(output_files.os, "replace", some)
        with pytest.raises(RuntimeError, match="a crash"):
            run()
    assert run_of(run.journal / "records") is not None
    assert run().answered == run.results == 0
    assert run.bytes == expected
    assert sorted(p.name for p in run.journal.iterdir()) == ["done.json", "lock"]


def test_a_finished_run_knows_its_files(run, expected):
    run()
    before = run.output.stat()
    assert (run().answered, run.results) == (0, 0)
    assert run.output.stat() == before
    assert run(overwrite=True).answered == run.results == 37
    assert run.bytes == expected
    run.output.write_bytes(expected[0] + b"more\n")
    with pytest.raises(ValueError, match=r"out\.jsonl exists; use --overwrite"):
        run()
    run.output.unlink()
    run.errors.unlink()
    assert run().answered == 37 and run.bytes == expected


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", ["input", "options"])
def test_another_run_is_refused(run, tmp_path, change, finished):
    run.source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    if finished:
        run()
    else:
        with pytest.raises(Interrupted):
            run(stop_after=1)
    if change == "input":
        write(run.source, [{"prompt": "a"}, {"prompt": "c"}])
    else:
        run.settings = dataclasses.replace(SETTINGS, defaults=SETTINGS.defaults | {"max_tokens": 5})
    with pytest.raises(
        ValueError, match=r"another run \([0-9a-f]{12}, this one is [0-9a-f]{12}\).*--overwrite"
    ):
        run()
    assert run.results == 0
    if not finished:  # what was begun after --overwrite goes on with it, too
        with pytest.raises(Interrupted):
            run(stop_after=1, overwrite=True)
        assert run(overwrite=True).answered == 1
    else:
        assert run(overwrite=True).answered == 2
    assert run.llm.tokenizer and len(read(run.output)) == 2


def test_a_run_that_found_nothing_is_in_nobodys_way(run, expected):
    settings = run.settings
    run.settings = dataclasses.replace(settings, seed=1)
    with pytest.raises(Interrupted):
        run(stop_after=0)
    run.settings = settings
    run()
    assert run.bytes == expected


def test_files_of_others_are_refused(run):
    run.output.write_text("precious")
    with pytest.raises(ValueError, match=r"out\.jsonl exists; use --overwrite or another name"):
        run()
    run.output.rename(run.errors)
    with pytest.raises(ValueError, match=r"errors\.jsonl exists"):
        run()
    assert run.errors.read_text() == "precious"
    run.errors = run.output
    with pytest.raises(ValueError, match="must be three files"):
        run()
    run.output = run.output.parent / "gone" / "out.jsonl"
    with pytest.raises(ValueError, match="there is no folder"):
        run()


def test_one_process_at_a_time(run):
    def answers(source, has):
        with pytest.raises(ValueError, match="another process is writing"):
            run()
        yield from ()

    with pytest.raises(RuntimeError, match="37 lines got no result"):
        batch_run.run_batch(run.source, run.output, run.errors, SETTINGS, answers)


def test_another_engine_is_refused(run):
    with pytest.raises(Interrupted):
        run(stop_after=5)

    def answers(source, has):
        yield "fp_2", Result(37, True, b"{}\n", 1)

    with pytest.raises(ValueError, match=r"fp_[0-9a-f]{32}, not fp_2: the model or the machine is another"):
        batch_run.run_batch(run.source, run.output, run.errors, SETTINGS, answers)
    assert not run.output.exists()


def test_parquet(llm, run, source, expected, tmp_path):
    """The same requests as a table, and the same answers in one."""
    rows = [{} if isinstance(line, bytes) else line for line in mixed(36)]
    for row in rows:
        if "body" in row:
            row["body"] = json.dumps(row["body"])
        row["id"] = str(row["id"]) if "id" in row else None
    strings = [row for row in rows if not isinstance(row.get("prompt"), list)]
    ids = [row for row in rows if isinstance(row.get("prompt"), list)]
    for name, some in (("strings", strings), ("ids", ids)):
        pq.write_table(pa.Table.from_pylist(_complete(some)), tmp_path / f"{name}.parquet", row_group_size=4)
        table = Run(llm, tmp_path / f"{name}.parquet", tmp_path / name, suffix=".parquet")
        with pytest.raises(Interrupted):
            table(stop_after=3)
        assert table().failed == 0
        lines = Run(llm, write(tmp_path / f"{name}.jsonl", some), tmp_path / f"{name} lines")
        lines()
        found = pq.read_table(table.output).to_pylist()
        assert len(found) == len(some) and len(read(lines.output)) == len(some)
        for row, answer in zip(found, read(lines.output), strict=True):
            assert row["text"] == texts(answer) == texts(json.loads(row["answer"]))
            assert row["id"] == answer.get("custom_id", answer["id"])
            assert set(row["finish_reason"]) <= {"stop", "length"}
        again = Run(llm, table.source, tmp_path / f"{name} again", suffix=".parquet")
        again()
        assert again.bytes == table.bytes
    run.output = run.output.with_suffix(".parquet")
    run()
    answers = pq.read_table(run.output)["answer"].to_pylist()
    assert "".join(f"{answer}\n" for answer in answers).encode() == expected[0]


def test_a_table_with_text_that_is_no_utf8(llm, tmp_path):
    prompts = pa.array([b"good", b"b\xffd", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in.parquet")
    run = Run(llm, tmp_path / "in.parquet", tmp_path)
    assert (run().failed, [a["line"] for a in read(run.output)]) == (1, [1, 3])
    (error,) = read(run.errors)
    assert error["line"] == 2 and "no UTF-8 (byte 2)" in error["error"]["message"]


def test_row_groups_are_bounded(run, monkeypatch):
    run.output = run.output.with_suffix(".parquet")
    monkeypatch.setattr(output_files, "GROUP_ROWS", 10)
    run()
    meta = pq.ParquetFile(run.output).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [10, 10, 10, 6]


def test_tables_that_hold_no_requests(tmp_path):
    with pytest.raises(ValueError, match=r"x\.parquet is no Parquet file"):
        sources.open_source(write(tmp_path / "x.parquet", [b"PAR1"]))
    pq.write_table(
        pa.table({"prompt": ["a"], "when": pa.array([1], pa.timestamp("s"))}), tmp_path / "y.parquet"
    )
    with pytest.raises(ValueError, match="column 'when' is timestamp"):
        sources.open_source(tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="holds no requests"):
        sources.open_source(write(tmp_path / "z.jsonl", [b"\n \n"]))
    with pytest.raises(ValueError, match="is no file"):
        sources.open_source(tmp_path)


def test_journal(tmp_path):
    path = tmp_path / "records"
    journal = Journal(path, "a-run", 5)
    assert journal.add(3, True, b"three") and journal.add(1, False, b"")
    assert not journal.add(3, True, b"again")
    journal.add_fingerprint("fp")
    journal.close()
    assert run_of(path) == "a-run" and run_of(tmp_path / "none") is None
    journal = Journal(path, "a-run", 5)
    assert (journal.run, journal.fingerprint, journal.done) == ("a-run", "fp", 2)
    assert [(r.number, r.kind.name, r.data) for r in journal.in_order()] == [
        (1, "error", b""),
        (3, "answer", b"three"),
    ]
    assert [n for n in range(6) if journal.has(n)] == [1, 3]
    journal.close()


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jaxdet", "batch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def test_command(command, folder, llm, tmp_path, monkeypatch):
    run = Run(llm, write(tmp_path / "in.jsonl", [*mixed(4), b"{bad\n", {"prompt": "short"}]), tmp_path / "a")
    run()
    out = tmp_path / "out.jsonl"
    options = ("-m", folder, "--max-tokens", 6, "--max-model-len", 512, "--max-num-seqs", 1)
    step, left = LLM.step, iter(range(9))

    def interrupted(llm):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return step(llm)

    def interrupted_at_the_end(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LLM, "step", interrupted)
        code, said = command(run.source, out, *options)
    assert code == 130 and said.count("\n") == 1
    assert "of 6 lines; the same command goes on from there" in said
    with monkeypatch.context() as patch:
        patch.setattr(batch_run, "publish", interrupted_at_the_end)
        code, said = command(run.source, out, *options)
    assert code == 130 and "stopped; the same command goes on from there" in said
    code, said = command(run.source, out, *options)
    assert code == 3
    assert f"5 answers in {out}, 1 errors in {tmp_path / 'out.errors.jsonl'}" in said
    assert (out.read_bytes(), out.with_suffix(".errors.jsonl").read_bytes()) == run.bytes
    code, said = command(run.source, out, *options)
    assert code == 3 and "nothing was left to do" in said
    code, said = command(run.source, out, *options, "--seed", 1)
    assert code == 1 and "another run" in said and said.count("\n") == 1
    code, said = command(tmp_path / "none.jsonl", out)
    assert code == 1 and "none.jsonl is no file" in said


def _complete(rows: list[dict]) -> list[dict]:
    """All rows with the same columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def test_ids_are_found_in_whatever_json_takes():
    assert _custom_id(b'{"custom_id": "a", "prompt": "\\ud800"}') == "a"
    assert _custom_id(b'\xef\xbb\xbf{"custom_id": "a"}') == "a"
    assert [_custom_id(x) for x in (b'{"custom_id": 1}', b'["custom_id"]', b'{"custom_id"', b"{}")] == [
        None
    ] * 4
