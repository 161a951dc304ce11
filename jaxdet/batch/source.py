"""Input files: JSON lines and Parquet, read in slices, never as a whole."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

MAX_LINE_BYTES = 32 * 2**20
SLICE_LINES = 256


class Line(NamedTuple):
    """One request as it was read; a row of a Parquet file becomes one too."""

    number: int
    """Counted from 1, blank lines included."""
    data: bytes
    """JSON; of a line that is too long the first MAX_LINE_BYTES + 1 bytes."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some lines that follow each other."""

    first: int
    """Number of the first one."""
    count: int
    """Blank lines included."""
    position: int
    """Where they begin: the byte of a file of JSON lines, the row group of a Parquet file."""


class Source(Protocol):
    """A file of requests."""

    digest: str
    """SHA-256 of the file, in hex."""
    requests: int
    """Lines that are not blank."""
    last: int
    """Number of the last line."""
    slices: list[Slice]

    def read(self, part: Slice) -> Iterator[Line]:
        """The lines of a slice, without blank ones."""
        ...


def open_source(path: Path) -> Source:
    """Looks through a file once.

    Raises:
        ValueError: it is no file, holds nothing, or is no Parquet that can hold requests.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a .jsonl or .parquet file")
    source = ParquetRows(path) if is_parquet(path) else JsonLines(path)
    if not source.requests:
        raise ValueError(f"{path} holds no requests; give one JSON object a line, or one request a row")
    return source


def is_parquet(path: Path) -> bool:
    return path.suffix == ".parquet"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class JsonLines:
    """A file with one JSON object a line."""

    def __init__(self, path: Path):
        self._path, self.digest = path, file_digest(path)
        self.requests, self.last, self.slices = 0, 0, []
        begin = 0
        with path.open("rb") as file:
            for data in _lines(file):
                self.requests += not _is_blank(data)
                self.last += 1
                if self.last % SLICE_LINES == 0:
                    self.slices.append(Slice(self.last - SLICE_LINES + 1, SLICE_LINES, begin))
                    begin = file.tell()
        if left := self.last % SLICE_LINES:
            self.slices.append(Slice(self.last - left + 1, left, begin))

    def read(self, part: Slice) -> Iterator[Line]:
        with self._path.open("rb") as file:
            file.seek(part.position)
            numbers = range(part.first, part.first + part.count)
            for number, data in zip(numbers, _lines(file), strict=False):
                if not _is_blank(data):
                    yield Line(number, data)


class ParquetRows:
    """A Parquet file with one request a row; a column is a field, and an absent field is null."""

    def __init__(self, path: Path):
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise ValueError(f"{path} needs pyarrow; pip install 'jaxdet[batch]'") from None
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowException as error:
            raise ValueError(f"{path} is no Parquet file ({error}); check its name") from None
        with file:
            for field in file.schema_arrow:
                if not _is_json(field.type):
                    raise ValueError(
                        f"{path}: column {field.name!r} is {field.type}; use text, numbers or lists"
                    )
            groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._path, self.digest = path, file_digest(path)
        self.slices, self.last = [], 0
        for place, rows in enumerate(groups):
            self.slices.append(Slice(self.last + 1, rows, place))
            self.last += rows
        self.requests = self.last

    def read(self, part: Slice) -> Iterator[Line]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._path) as file:
            number = part.first
            for batch in file.iter_batches(SLICE_LINES, row_groups=[part.position]):
                for place in range(batch.num_rows):
                    try:
                        (row,) = batch.slice(place, 1).to_pylist()
                        data = json.dumps(_without_nulls(row), ensure_ascii=False).encode()
                    except UnicodeDecodeError as error:  # text that isn't: the line's own error
                        data = bytes(error.object)
                    yield Line(number, data)
                    number += 1


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of those that are too long the beginning."""
    while data := file.readline(MAX_LINE_BYTES + 1):
        line = data
        while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
            pass
        yield data


def _is_blank(data: bytes) -> bool:
    return len(data) <= MAX_LINE_BYTES and not data.strip()


def _is_json(kind: Any) -> bool:
    """Whether values of an Arrow type have a form in JSON."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    if types.is_dictionary(kind):
        return _is_json(kind.value_type)
    plain = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer)
    plain += (types.is_floating, types.is_boolean, types.is_null)
    return any(holds(kind) for holds in plain)


def _without_nulls(value: Any) -> Any:
    """Tables have a null where JSON has no field at all."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
