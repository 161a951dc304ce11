"""The command: what it prints, what it reads, and one line for whatever goes wrong."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxdet.cli import main
from jaxdet.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def jaxdet(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, from an empty folder."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jaxdet", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_the_command_is_installed(tmp_path):
    command = [Path(sys.executable).parent / "jaxdet", "info", "./gone"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("jaxdet: no model './gone'") and done.stderr.count("\n") == 1


def test_an_empty_key_of_the_environment_opens_no_server(jaxdet, monkeypatch):
    monkeypatch.setenv("JAXDET_API_KEY", " ")
    done = jaxdet("serve", "demo")
    assert done.returncode == 1 and "JAXDET_API_KEY is empty; unset it" in done.stderr


def test_generate(jaxdet, tiny):
    first = jaxdet("generate", "-m", tiny, "Hello", "--max-tokens", 8)
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip()
    again = jaxdet("generate", "-m", tiny, "--max-tokens", 8, stdin="Hello\n")
    assert again.stdout == first.stdout


def test_generate_json(jaxdet, tiny):
    options = ("--max-tokens", 4, "--temperature", 1, "--seed", 3, "-n", 2, "--logprobs", 2, "--json")
    done = jaxdet("generate", "-m", tiny, "one", "two", *options)
    outputs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outputs) == 2
    for output in outputs:
        assert [o["index"] for o in output["outputs"]] == [0, 1]
        assert all(len(o["token_ids"]) == len(o["logprobs"]) for o in output["outputs"])
    assert jaxdet("generate", "-m", tiny, "two", *options).stdout.splitlines() != []


def test_chat_keeps_the_conversation(jaxdet, tiny):
    done = jaxdet("chat", tiny, "--max-tokens", 4, "--json", stdin="Hi\n\nAnd you?\n")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["prompt"] in second["prompt"]
    assert "And you?" in second["prompt"]
    plain = jaxdet("chat", tiny, "--max-tokens", 4, stdin="Hi\nAnd you?\n")
    answers = [first["outputs"][0]["text"], second["outputs"][0]["text"]]
    assert plain.stdout.splitlines() == [line for a in answers for line in (a.splitlines() or [""])]


def test_chat_goes_on_after_a_turn_that_is_too_long(jaxdet, tiny):
    options = ("--max-tokens", 4, "--max-model-len", 64, "--json")
    done = jaxdet("chat", tiny, *options, stdin="Hi\n" + "x" * 99 + "\nAnd you?\n")
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert "xxx" not in second["prompt"] and first["prompt"] in second["prompt"]
    assert "max_model_len" in done.stderr


def test_what_nobody_expected_is_one_line_too(jaxdet, tiny, monkeypatch):
    monkeypatch.setattr("jaxdet.cli.models.open_checkpoint", lambda src, **_: {}[src])
    done = jaxdet("info", "tiny")
    assert done.stderr.startswith("jaxdet: KeyError: 'tiny' (unexpected;") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_convert_then_generate(jaxdet, tiny, tmp_path, format):
    done = jaxdet("convert", tiny, tmp_path / "new", "--format", format)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        jaxdet("generate", "-m", m, "Hello", "--max-tokens", 8).stdout for m in (tmp_path / "new", tiny)
    )
    assert ours == theirs != ""


def test_info(jaxdet, tiny):
    facts = json.loads(jaxdet("info", tiny, "--json").stdout)
    assert (facts["family"], facts["num_layers"], facts["backend"]) == ("llama", 2, "xla")
    assert facts["parameters"] > 50_000
    assert "platform_key" in jaxdet("info").stdout


def wrong(name: str, *arguments: object, says: str, stdin: str = ""):
    return pytest.param(arguments, says, stdin, id=name)


@pytest.mark.parametrize(
    ("arguments", "says", "stdin"),
    [
        wrong("unknown model", "generate", "-m", "nothing-here", "x", says="nothing-here"),
        wrong("empty prompt", "generate", "-m", "TINY", says="prompt is empty"),
        wrong("temperature", "generate", "-m", "TINY", "x", "--temperature", "-1", says="temperature=-1.0"),
        wrong("top_p", "generate", "-m", "TINY", "x", "--top-p", "0", says="top_p=0.0"),
        wrong("long prompt", "generate", "-m", "TINY", "x" * 5000, says="max_model_len"),
        wrong("dtype", "generate", "-m", "TINY", "x", "--dtype", "int8", says="dtype='int8'"),
        wrong("backend", "generate", "-m", "TINY", "x", "--backend", "cuda", says="backend='cuda'"),
        wrong("no folder", "verify", "TINY", "--output", "no/where.json", says="no/where.json"),
        wrong("a folder as report", "verify", "TINY", "--output", ".", says="output ."),
        wrong("bytes", "generate", "-m", "TINY", "a\udcffb", says="UTF-8"),
        wrong("short model", "generate", "-m", "TINY", "x", "--max-model-len", "9", says="max_model_len"),
        wrong("destination", "convert", "TINY", "TINY", says="exists"),
        wrong("source", "convert", "./gone.gguf", "new", says="gone.gguf"),
    ],
)
def test_errors_are_one_line(jaxdet, tiny, arguments, says, stdin):
    done = jaxdet(*(tiny if a == "TINY" else a for a in arguments), stdin=stdin)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("jaxdet: ") and says in lines[0]
