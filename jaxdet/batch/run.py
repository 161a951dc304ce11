"""A whole run: what it may write, what was done before, what is left, and the end."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from jaxdet.batch.duplicates import duplicates
from jaxdet.batch.journal import Journal, run_of, sync_folder
from jaxdet.batch.output import publish, sync_file
from jaxdet.batch.request import Result
from jaxdet.batch.source import Source, file_digest, is_parquet, open_source
from pallas_kernels.numerics import NUMERICS_VERSION

SHOWN_DIGITS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What answers depend on, besides the lines themselves."""

    model: str
    served_model_name: str | None = None
    """What requests must call it; its own name by default."""
    dtype: str = "auto"
    backend: str | None = None
    max_model_len: int | None = None
    seed: int = 0
    """Of requests that bring none."""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sampling parameters of prompts that don't bring them."""


Answers = Callable[[Source, Callable[[int], bool]], Generator[tuple[str, Result]]]
"""Given a source and which of its lines are done: an engine's fingerprint with the result of each other line."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended."""

    requests: int
    failed: int
    """Lines of the errors file."""
    answered: int
    """Lines that this process got results of; the others were there already."""
    tokens: int
    """Sampled by this process."""
    seconds: float


class RunError(RuntimeError):
    """What does the work can't go on; the message says why, in one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what is done and how to go on."""


def run_batch(
    source: Path, output: Path, errors: Path, settings: Settings, answers: Answers, *, overwrite: bool = False
) -> Summary:
    """Answers every line of a file; if an earlier process began to, it goes on from there.

    Args:
        source: a .jsonl or .parquet file.
        output: gets the answers, and `errors` what is wrong with the other lines, both in the order of the lines.
        answers: what does the work; not called if nothing is left to do.
        overwrite: replace files that aren't this run's own, and do finished work again.

    Raises:
        ValueError: a file would be overwritten or isn't usable.
        RunError: the work can't go on.
        Interrupted: by Ctrl-C.
    """
    _check_places(source, output, errors)
    lines = open_source(source)
    run = _digest(lines, errors, settings)
    folder = output.with_name(f"{output.name}.journal")
    records, receipt = folder / "records", folder / "done.json"
    with _alone(folder, output):
        done = _read_receipt(receipt)
        if not overwrite and done.get("run") == run and _are_files(done, output, errors):
            records.unlink(missing_ok=True)
            return Summary(done["requests"], done["failed"], 0, 0, 0.0)
        if run_of(records) != run or (overwrite and done.get("run") == run):
            if not overwrite:
                _refuse_others(run, run_of(records) or done.get("run"), output, errors)
            receipt.unlink(missing_ok=True)
            records.unlink(missing_ok=True)
        journal = Journal(records, run, lines.last)
        with contextlib.closing(journal):
            before, began = journal.done, time.perf_counter()
            tokens = _answer(lines, journal, answers) if before < lines.requests else 0
            failed = publish(journal, output, errors, folder)
            _write_receipt(receipt, journal, lines, failed, output, errors)
        records.unlink()
    return Summary(lines.requests, failed, lines.requests - before, tokens, time.perf_counter() - began)


def _answer(lines: Source, journal: Journal, answers: Answers) -> int:
    """Gets what is missing into the journal; returns how many tokens were sampled for it."""
    tokens = 0
    try:
        for result in duplicates(lines):  # before the work is shared out: workers see only their own lines
            journal.add(result.number, result.good, result.data)
        began = time.perf_counter()
        bar = tqdm(total=lines.requests, initial=journal.done, desc="Answering", unit="line", disable=None)
        with bar, contextlib.closing(answers(lines, journal.has)) as results:
            for fingerprint, result in results:
                if journal.fingerprint is None:
                    journal.add_fingerprint(fingerprint)
                elif journal.fingerprint != fingerprint:
                    raise ValueError(
                        f"answers so far are by an engine with fingerprint {journal.fingerprint}, not {fingerprint}: "
                        "the model or the machine is another; use the same ones, or another OUT"
                    )
                if journal.add(result.number, result.good, result.data):
                    tokens += result.tokens
                    rate = tokens / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped after {journal.done} of {lines.requests} lines; the same command goes on from there"
        ) from None
    finally:
        journal.sync()
    if journal.done < lines.requests:
        raise RunError(f"{lines.requests - journal.done} lines got no result; run the same command again")
    return tokens


def _digest(lines: Source, errors: Path, settings: Settings) -> str:
    facts = dataclasses.asdict(settings) | {
        "input": lines.digest,
        "errors": str(errors),
        "jaxdet": importlib.metadata.version("jaxdet"),
        "numerics_version": NUMERICS_VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check_places(source: Path, output: Path, errors: Path) -> None:
    if len({path.resolve() for path in (source, output, errors)}) < 3:
        raise ValueError("input, output and errors must be three files; give them other names")
    for path in (output, errors):
        if not path.parent.is_dir():
            raise ValueError(f"there is no folder {path.parent}; make it first")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file; use another name")
    if is_parquet(output) and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{output} needs pyarrow; pip install 'jaxdet[batch]'")


@contextlib.contextmanager
def _alone(folder: Path, output: Path) -> Iterator[None]:
    """The run's own folder, which no other process may use meanwhile."""
    folder.mkdir(exist_ok=True)
    try:
        with filelock.FileLock(folder / "lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ValueError(f"another process is writing {output}; wait for it or use another OUT") from None


def _refuse_others(run: str, other: str | None, output: Path, errors: Path) -> None:
    """Raises ValueError if there is anything that isn't this run's."""
    if other is not None and other != run:
        raise ValueError(
            f"{output} belongs to another run ({other[:SHOWN_DIGITS]}, this one is {run[:SHOWN_DIGITS]}): "
            "input or options differ; use --overwrite or another OUT"
        )
    for path in (output, errors):
        if path.exists():
            raise ValueError(f"{path} exists; use --overwrite or another name")


def _read_receipt(path: Path) -> dict[str, Any]:
    """What an earlier run wrote at its end; empty if it didn't get there."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}


def _write_receipt(
    path: Path, journal: Journal, lines: Source, failed: int, output: Path, errors: Path
) -> None:
    """Lets the same command know its own files when it is given again."""
    facts = {
        "run": journal.run,
        "system_fingerprint": journal.fingerprint,
        "requests": lines.requests,
        "failed": failed,
        "output": file_digest(output),
        "errors": file_digest(errors),
    }
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(json.dumps(facts, indent=1).encode())
        sync_file(file)
    new.replace(path)
    sync_folder(path.parent)


def _are_files(done: dict[str, Any], output: Path, errors: Path) -> bool:
    """Whether both are still what the run wrote."""
    return all(
        path.is_file() and file_digest(path) == done[name]
        for name, path in (("output", output), ("errors", errors))
    )
