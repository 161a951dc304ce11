"""Inputs of batch runs, and runs over engines that are already there."""

import json
from pathlib import Path

from jaxdet.batch.engine import BatchEngine
from jaxdet.batch.request import Requests
from jaxdet.batch.run import Settings, Summary, run_batch
from jaxdet.llm import LLM

SETTINGS = Settings(model="tiny", defaults={"max_tokens": 6, "temperature": 0.0})
CHAT = "/v1/chat/completions"


def openai_line(name: str, url: str, **body: object) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "tiny"} | body}


def mixed(count: int, *, seed: int = 1000) -> list[dict]:
    """Requests of every form, of many lengths, each with a seed of its own."""
    lines: list[dict] = []
    for i in range(count):
        text = f"{'word ' * (i * 7 % 11)}{i}"
        sampled = {"temperature": 0.9, "seed": seed + i, "max_tokens": 2 + i * 5 % 9}
        lines.append(
            [
                {"prompt": text, "id": f"plain {i}"} | sampled,
                openai_line(f"chat {i}", CHAT, messages=[{"role": "user", "content": text}], **sampled),
                openai_line(f"raw {i}", "/v1/completions", prompt=[text, "é"], n=2, logprobs=2, **sampled),
                {"prompt": list(text.encode()), "stop": ["e", "Q"], "id": i} | sampled,
            ][i % 4]
        )
    return lines


def write(path: Path, lines: list) -> Path:
    """Dictionaries as JSON, bytes as they are."""
    path.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(answer: dict) -> list[str]:
    """What an answer says, in either format."""
    body = answer["response"]["body"] if "response" in answer else answer
    return [c["text"] if "text" in c else c["message"]["content"] for c in body["choices"]]


def differing(ours: bytes, theirs: bytes) -> int:
    """How many answers of two outputs say something else."""
    pairs = zip(ours.splitlines(), theirs.splitlines(), strict=True)
    return sum(texts(json.loads(a)) != texts(json.loads(b)) for a, b in pairs)


class Run:
    """A run of `source` into `folder`, by an engine that is already there."""

    def __init__(self, llm: LLM, source: Path, folder: Path, *, suffix: str = ".jsonl", settings=SETTINGS):
        folder.mkdir(exist_ok=True)
        self.llm, self.source, self.settings = llm, source, settings
        self.output, self.errors = folder / f"out{suffix}", folder / "errors.jsonl"
        self.journal = folder / f"out{suffix}.journal"
        self.results = 0
        """Lines that its engine answered in the last call."""

    def __call__(self, *, stop_after: int | None = None, overwrite: bool = False) -> Summary:
        """Runs to the end, or until Ctrl-C comes after some results."""
        self.results = 0

        def answers(source, has):
            requests = Requests(self.llm, "tiny", self.settings.defaults)
            lines = (line for part in source.slices for line in source.read(part) if not has(line.number))
            for result in BatchEngine(self.llm, requests).answers(lines):
                if self.results == stop_after:
                    raise KeyboardInterrupt
                self.results += 1
                yield requests.fingerprint, result

        return run_batch(self.source, self.output, self.errors, self.settings, answers, overwrite=overwrite)

    @property
    def bytes(self) -> tuple[bytes, bytes]:
        return self.output.read_bytes(), self.errors.read_bytes()
