"""What a run has found out so far, on disk: whatever happens, every whole record of it counts."""

import array
import enum
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAGIC = b"jaxdet batch 1\n"
SYNC_SECONDS = 1.0
_HEAD = struct.Struct("<IIQB")
"""CRC-32 of all that follows, length of the content, number of the line, kind."""
_CHECKED = 4
"""Where what the CRC covers begins."""


class Kind(enum.IntEnum):
    run = 0
    """Digest of input and options; the first record."""
    fingerprint = 1
    """Of the engine; before any answer."""
    answer = 2
    error = 3


class Record(NamedTuple):
    kind: Kind
    number: int
    """Of the line that it belongs to; 0 for none."""
    data: bytes


class Journal:
    """Appends records to a file and finds them again by their line.

    A record is whole or it isn't there: what a crash left of the last one is cut off when the file is opened again. A
    process that is killed loses no record; a machine that goes down loses those of the last SYNC_SECONDS.

    Args:
        path: made if it isn't there; nobody else may write it.
        run: digest of the run, for a new file.
        last: number of the last line of the input.
    """

    def __init__(self, path: Path, run: str, last: int):
        self._places = array.array("Q", bytes(8 * (last + 1)))
        """Where each line's record begins; 0: nowhere."""
        self.done = 0
        """Lines that have a record."""
        self.run, self.fingerprint = run, None
        end = 0
        if path.exists():
            with path.open("rb") as file:
                for place, record, end in _records(file):  # noqa: B007
                    self._note(place, record)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._file, end)
        self._end, self._synced = end, time.monotonic()
        if not end:
            self._write(MAGIC)
            self._append(Record(Kind.run, 0, run.encode()))
            self.sync()
            sync_folder(path.parent)

    def has(self, number: int) -> bool:
        """Whether a line has its answer or its error."""
        return self._places[number] > 0

    def add(self, number: int, good: bool, data: bytes) -> bool:
        """Notes what came of a line, unless that is known already; returns whether it was new."""
        if self.has(number):
            return False
        self._append(Record(Kind.answer if good else Kind.error, number, data))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        return True

    def add_fingerprint(self, fingerprint: str) -> None:
        """Notes whose answers these are."""
        self._append(Record(Kind.fingerprint, 0, fingerprint.encode()))

    def in_order(self) -> Iterator[Record]:
        """Answers and errors in the order of their lines."""
        with open(self._file, "rb", closefd=False) as file:
            for place in filter(None, self._places):
                file.seek(place)
                record = _record(file)
                assert record is not None
                yield record

    def sync(self) -> None:
        """Returns once the disk has all of it."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._file)

    def _append(self, record: Record) -> None:
        place, content = self._end, _HEAD.pack(0, len(record.data), record.number, record.kind) + record.data
        self._write(zlib.crc32(content[_CHECKED:]).to_bytes(_CHECKED, "little") + content[_CHECKED:])
        self._note(place, record)

    def _write(self, data: bytes) -> None:
        """Appends in one piece; without it, if the disk is full."""
        written = os.write(self._file, data)
        if written < len(data):
            os.ftruncate(self._file, self._end)
            raise OSError(f"only {written} of {len(data)} bytes could be written; make room on the disk")
        self._end += written

    def _note(self, place: int, record: Record) -> None:
        if record.kind == Kind.run:
            self.run = record.data.decode()
        elif record.kind == Kind.fingerprint:
            self.fingerprint = record.data.decode()
        else:
            self.done += not self._places[record.number]
            self._places[record.number] = place


def run_of(path: Path) -> str | None:
    """Digest of the run whose journal a file is; None if there is no file, or no line's result in it."""
    run = None
    if path.exists():
        with path.open("rb") as file:
            for _, record, _ in _records(file):
                if record.number:
                    return run
                if record.kind == Kind.run:
                    run = record.data.decode()
    return None


def sync_folder(folder: Path) -> None:
    """Returns once the disk knows the names in a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _records(file: BinaryIO) -> Iterator[tuple[int, Record, int]]:
    """Whole records, with where each begins and ends, up to the first that isn't one."""
    if file.read(len(MAGIC)) != MAGIC:
        return
    place = len(MAGIC)
    while (record := _record(file)) is not None:
        end = place + _HEAD.size + len(record.data)
        yield place, record, end
        place = end


def _record(file: BinaryIO) -> Record | None:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    crc, length, number, kind = _HEAD.unpack(head)
    data = file.read(length)
    if len(data) < length or zlib.crc32(data, zlib.crc32(head[_CHECKED:])) != crc:
        return None
    return Record(Kind(kind), number, data)
