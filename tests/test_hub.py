"""Models by Hugging Face id, against a small hub on loopback."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tokenizers
from huggingface_hub import constants
from safetensors.numpy import load_file, save
from tokenizers import models

from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.checkpoints.hf import INDEX

MODEL, COMMITS = "tiny/llama", {"main": "a" * 40, "v1": "b" * 40}
POISON = ("pytorch_model.bin", "modeling_llama.py", "model.ckpt", "README.md")
OTHER_COPIES = (
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "original/model.safetensors",
    "original/params.json",
    "onnx/config.json",
)
"""The same weights for other programs, and files that belong to those."""


class Hub(http.server.ThreadingHTTPServer):
    """Serves one model's revisions; notes every request; can refuse or break off."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requests: list[tuple[str, str, str | None]] = []
        self.refuse: tuple[int, str] | None = None
        self.break_off: dict[str, int] = {}
        """By file: how often a download still ends half way."""
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Paths in the repository."""
        paths = [path.partition("/resolve/")[2] for _, path, _ in self.requests]
        return {path.partition("/")[2] for path in paths if path}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.refuse is not None:
            status, code = self.server.refuse
            return self.answer(status, b"", {"X-Error-Code": code})
        match path.strip("/").split("/"):
            case ["api", "models", owner, name, "revision", revision] if f"{owner}/{name}" == MODEL:
                commit = revision if revision in COMMITS.values() else COMMITS.get(revision)
                if commit is None:
                    return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return self.json({"id": MODEL, "modelId": MODEL, "sha": commit, "siblings": []})
            case ["api", "models", _, _, "tree", _]:
                return self.json(
                    [
                        {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                        for n, b in self.server.files.items()
                    ]
                )
            case [_, _, "resolve", commit, *parts] if (name := "/".join(parts)) in self.server.files:
                return self.file(name, commit)
        return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, commit: str):
        body = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": commit}
        headers["Accept-Ranges"] = "bytes"
        start = 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        half = self.command == "GET" and self.server.break_off.get(name, 0) > 0
        self.answer(206 if wanted else 200, body[start:], headers, half=half)
        if half:
            self.server.break_off[name] -= 1

    def answer(self, status: int, body: bytes, headers: dict[str, str], half: bool = False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if half else body)
        self.close_connection = half


@pytest.fixture
def files(references: Path) -> dict[str, bytes]:
    backend = tokenizers.Tokenizer(models.BPE({chr(33 + i): i for i in range(90)}, []))
    found = {n: (references / "llama" / n).read_bytes() for n in ("config.json", "model.safetensors")}
    found["tokenizer.json"] = backend.to_str().encode()
    return found | dict.fromkeys((*POISON, *OTHER_COPIES), b"\x80\x04never read")


@pytest.fixture
def hub(files, tmp_path: Path, monkeypatch):
    server = Hub(files)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def refused(model: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_model_by_id(hub: Hub, references: Path, revision: str):
    checkpoint = open_checkpoint(MODEL + revision)
    assert checkpoint.name == MODEL + revision
    assert checkpoint.digest() == open_checkpoint(references / "llama").digest()
    commit = COMMITS[revision.removeprefix("@") or "main"]
    assert all(commit in path for _, path, _ in hub.requests if "/resolve/" in path)


def test_only_weights_config_and_tokenizer_are_asked_for(hub: Hub):
    open_checkpoint(MODEL)
    assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer.json"}


def test_only_the_files_that_the_index_lists(hub: Hub, references: Path):
    """Their names are free; a model.safetensors beside them is not part of the model."""
    names = [f"weights-{i}.safetensors" for i in range(2)]
    tensors = load_file(references / "llama" / "model.safetensors")
    place = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    for name in names:
        hub.files[name] = save({t: tensors[t] for t in tensors if place[t] == name})
    hub.files[INDEX] = json.dumps({"weight_map": place}).encode()
    assert open_checkpoint(MODEL).digest() == open_checkpoint(references / "llama").digest()
    assert hub.fetched() == {"config.json", INDEX, "tokenizer.json", *names}


@pytest.mark.parametrize("index", [b'{"weight_map": {"a": "../x"}}', b'{"weight_map": 7}', b"["])
def test_a_damaged_index_on_the_hub(hub: Hub, index: bytes):
    hub.files[INDEX] = index
    refused(MODEL, ValueError, INDEX)


def test_an_unsupported_architecture_costs_no_weights(hub: Hub):
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps(config | {"model_type": "mamba"}).encode()
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
        LLM(MODEL)
    assert hub.fetched() == {"config.json", "tokenizer.json"}
    assert open_checkpoint(MODEL).config["model_type"] == "mamba"  # a conversion needs no architecture
    assert "model.safetensors" in hub.fetched()


def test_a_repository_without_config(hub: Hub):
    del hub.files["config.json"]
    refused(MODEL, ValueError, f"{MODEL} has no config.json; give a model in the format of transformers")
    assert "model.safetensors" not in hub.fetched()


def test_a_second_call_downloads_nothing(hub: Hub):
    open_checkpoint(MODEL)
    hub.requests.clear()
    open_checkpoint(MODEL)
    assert not hub.fetched()
    hub.shutdown()
    hub.server_close()
    assert open_checkpoint(MODEL).name == MODEL  # and the hub may be away


def test_unknown_ids(hub: Hub):
    refused("tiny/absent", FileNotFoundError, "no model 'tiny/absent' on the hub")
    refused(f"{MODEL}@v9", FileNotFoundError, "no model 'tiny/llama@v9' on the hub")
    refused("tiny/--bad--", FileNotFoundError, "no model 'tiny/--bad--' on the hub")


@pytest.mark.parametrize("status", [401, 403])
def test_gated(hub: Hub, status: int):
    hub.refuse = (status, "GatedRepo")
    refused(MODEL, FileNotFoundError, "is gated; accept its licence on its page and set HF_TOKEN")


def test_unauthorised(hub: Hub):
    hub.refuse = (401, "RepoNotFound")
    refused(MODEL, FileNotFoundError, "set HF_TOKEN if it is private")


def test_hub_down(hub: Hub):
    hub.shutdown()
    hub.server_close()
    refused(MODEL, OSError, "the hub can't be reached; check the network or HF_ENDPOINT")


def test_hub_out_of_order(hub: Hub):
    hub.refuse = (500, "")
    refused(MODEL, OSError, "the hub can't be reached")


def test_an_interrupted_download_is_no_model_and_the_next_call_completes_it(hub: Hub, references, tmp_path):
    hub.break_off["model.safetensors"] = 100
    refused(MODEL, OSError, "run again to resume")
    assert not list((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))
    hub.break_off.clear()
    assert open_checkpoint(MODEL).digest() == open_checkpoint(references / "llama").digest()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_a_dropped_connection_resumes_where_it_was(hub: Hub, references, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    hub.break_off["model.safetensors"] = 1
    assert open_checkpoint(MODEL).digest() == open_checkpoint(references / "llama").digest()
    size = len(hub.files["model.safetensors"])
    ranges = {r for _, path, r in hub.requests if path.endswith("model.safetensors")} - {None}
    assert len(ranges) == 1
    assert 0 < int(ranges.pop().removeprefix("bytes=").rstrip("-")) <= size // 2


def test_a_damaged_file_on_the_hub(hub: Hub):
    hub.files["model.safetensors"] = hub.files["model.safetensors"][:-5]
    refused(MODEL, ValueError, "model.safetensors is damaged or incomplete")


def test_a_repository_of_pickles(hub: Hub):
    del hub.files["model.safetensors"]
    refused(MODEL, ValueError, "reads safetensors only, never pickled weights")
    assert not hub.fetched() & set(POISON)


def test_no_space_in_the_cache(hub: Hub, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    refused(MODEL, OSError, "No space left on device.*run again to resume")


def test_the_environment_variable(hub: Hub, tmp_path: Path):
    """As a user sets it; huggingface_hub reads it when it is imported."""
    code = (
        "import jaxdet; out = jaxdet.generate({'prompt_token_ids': [3, 4]}, model='tiny/llama', max_tokens=4); "
        "print(len(out[0].outputs[0].token_ids))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() in {"1", "2", "3", "4"}, done.stderr
    assert "model.safetensors" in hub.fetched()
