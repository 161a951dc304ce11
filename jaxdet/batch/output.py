"""Output files: written beside their place, from the journal, and put there in one go."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from jaxdet.batch.journal import Journal, Kind, sync_folder
from jaxdet.batch.source import is_parquet

GROUP_ROWS = 4096
GROUP_BYTES = 64 * 2**20
"""A row group of a Parquet file ends at the row that reaches either."""


def publish(journal: Journal, output: Path, errors: Path, scratch: Path) -> int:
    """Writes answers and errors in the order of their lines.

    Args:
        scratch: a folder for files that aren't whole yet, on the same file system.

    Returns:
        How many lines are in `errors`.
    """
    failed = 0
    new_output, new_errors = scratch / "output", scratch / "errors"
    with _writer(new_output, parquet=is_parquet(output)) as write, new_errors.open("wb") as error_file:
        for record in journal.in_order():
            if record.kind == Kind.answer:
                write(record.data)
            else:
                error_file.write(record.data)
                failed += 1
        sync_file(error_file)
    for new, place in ((new_errors, errors), (new_output, output)):
        os.replace(new, place)
        sync_folder(place.parent)
    return failed


def sync_file(file: BinaryIO) -> None:
    """Returns once the disk has all that was written."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _writer(path: Path, *, parquet: bool) -> Iterator[Callable[[bytes], Any]]:
    with path.open("wb") as file:
        if parquet:
            with _ParquetFile(file) as rows:
                yield rows.write
        else:
            yield file.write
        sync_file(file)


class _ParquetFile:
    """One row for each answer: what people look at in columns, and the line that a .jsonl file would have had."""

    def __init__(self, file: BinaryIO):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            {
                "id": pa.string(),
                "text": pa.list_(pa.string()),
                "finish_reason": pa.list_(pa.string()),
                "answer": pa.string(),
            }
        )
        self._writer = pq.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> "_ParquetFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, line: bytes) -> None:
        answer = json.loads(line)
        user_id = answer.get("custom_id", answer.get("id"))
        body = answer["response"]["body"] if "response" in answer else answer
        self._rows.append(
            {
                "id": None if user_id is None else str(user_id).encode(errors="replace").decode(),
                "text": [c["text"] if "text" in c else c["message"]["content"] for c in body["choices"]],
                "finish_reason": [c["finish_reason"] for c in body["choices"]],
                "answer": line.decode().rstrip("\n"),
            }
        )
        self._bytes += len(line)
        if len(self._rows) == GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows, self._bytes = [], 0
