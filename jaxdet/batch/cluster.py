"""Many engines on a Ray cluster: Ray Data reads lines where the command runs, and a pool of actors answers them."""

import copy
import dataclasses
import functools
import itertools
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data import ActorPoolStrategy, Datasource, ReadTask
from ray.data.block import BlockMetadata

from jaxdet.batch.local import make_engine
from jaxdet.batch.request import Result
from jaxdet.batch.run import RunError, Settings
from jaxdet.batch.source import SLICE_LINES, Line, Slice, Source

_Chunk = tuple[Slice, Sequence[int]]
"""Numbers of some lines of a slice."""

LINE = pa.schema({"number": pa.int64(), "data": pa.large_binary()})
RESULT = pa.schema(
    {
        "number": pa.int64(),
        "good": pa.bool_(),
        "data": pa.large_binary(),
        "tokens": pa.int64(),
        "fingerprint": pa.string(),
        "trouble": pa.string(),
    }
)
MOST_PIECES = 16
CALLS = 3
"""Blocks of lines that a worker has at once, so that one that ends leaves it enough to do."""
CONNECT_SECONDS = 5.0


def answer_on_ray(
    settings: Settings,
    source: Source,
    has: Callable[[int], bool],
    *,
    address: str,
    workers: int,
    **llm: Any,
) -> Generator[tuple[str, Result]]:
    """Results of the lines that are missing, with their engines' fingerprints; see `run.Answers`.

    Args:
        address: HOST:PORT of a cluster, or "auto": the one that this machine belongs to.
        workers: engines. Each has a GPU of its own if the cluster has any.
        llm: arguments of `LLM` that change no answer.

    Raises:
        ValueError: there is no cluster at the address.
        RunError: a worker failed.
    """
    if (folder := Path(settings.model)).exists():  # workers run elsewhere
        settings = dataclasses.replace(settings, model=str(folder.resolve()))
    _connect(address)
    try:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0))
        chunks = _chunks(source, has, workers)
        lines = ray.data.read_datasource(
            _Lines(source, chunks),
            override_num_blocks=len(chunks),
            concurrency=2,
            num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        answers = lines.map_batches(
            _Worker,
            fn_constructor_args=(settings, llm),
            batch_size=max(len(numbers) for _, numbers in chunks),
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=CALLS + 1,
                max_concurrent_calls_per_actor=CALLS,
                enable_true_multi_threading=True,
            ),
            num_gpus=gpus,
            num_cpus=0 if gpus else 1,
        )
        for batch in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows: list[dict[str, Any]] = batch.to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
            for row in rows:
                fingerprint, trouble = row.pop("fingerprint"), row.pop("trouble")
                if trouble is not None:
                    raise RunError(f"a worker failed: {trouble}")
                yield fingerprint, Result(**row)
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray failed: {str(error).splitlines()[-1]}; the same command goes on") from None
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what ends a run comes out as an exception, too
    # What is there may have died, or isn't Ray at all: one attempt, where Ray makes twenty of half a minute each.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"ray={address!r} must be auto or HOST:PORT, as `ray start --head` prints it")
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except OSError as error:
            raise ValueError(f"ray={address}: no cluster answers ({error}); see `ray status` there") from None
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ValueError(
            f"ray={address}: {str(error).splitlines()[0]}; `ray start --head` starts a cluster, "
            "and RAY_AUTH_MODE=token joins one that wants a token"
        ) from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _chunks(source: Source, has: Callable[[int], bool], workers: int) -> list[_Chunk]:
    """The missing lines, in pieces small enough that every worker gets some."""
    missing: list[tuple[Slice, Sequence[int]]] = []
    for part in source.slices:
        numbers = range(part.first, part.first + part.count)
        left = [number for number in numbers if not has(number)]
        if left:
            missing.append((part, numbers if len(left) == len(numbers) else left))
    rows = -(-sum(len(numbers) for _, numbers in missing) // (workers * CALLS))
    chunks = []
    for part, numbers in missing:
        # A row group is read anew for each of its pieces.
        size = max(min(rows, SLICE_LINES), -(-part.count // MOST_PIECES))
        chunks += [(part, numbers[at : at + size]) for at in range(0, len(numbers), size)]
    return chunks


class _Lines(Datasource):
    """The lines of some chunks, one block each."""

    def __init__(self, source: Source, chunks: list[_Chunk]):
        super().__init__()
        self._source, self._chunks = copy.copy(source), chunks
        self._source.slices = []  # it travels with every task

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(functools.partial(_read, self._source, part, numbers), unknown)
            for part, numbers in self._chunks
        ]


def _read(source: Source, part: Slice, numbers: Sequence[int]) -> list[pa.Table]:
    wanted = numbers if isinstance(numbers, range) else frozenset(numbers)
    rows = [line._asdict() for line in source.read(part) if line.number in wanted]
    return [pa.Table.from_pylist(rows, LINE)]


class _Worker:
    """One engine; several threads hand it lines and wait for the answers.

    What goes wrong is one of its answers: as an exception Ray would try again, and tell of it in a hundred lines.
    """

    def __init__(self, settings: Settings, llm: dict[str, Any]):
        self._trouble: Exception | None = None
        self._inbox: queue.SimpleQueue[tuple[Line, Future[Result]]] = queue.SimpleQueue()
        self._waiting: dict[int, list[Future[Result]]] = {}
        try:
            self._engine, self._fingerprint = make_engine(settings, **llm)
        except Exception as error:
            self._trouble = error
        else:
            threading.Thread(target=self._run, name="engine", daemon=True).start()

    def __call__(self, batch: pa.Table) -> pa.Table:
        futures: list[Future[Result]] = []
        try:
            if self._trouble is not None:
                raise self._trouble
            for row in batch.to_pylist():
                futures.append(Future())
                self._inbox.put((Line(**row), futures[-1]))
            rows = [future.result()._asdict() | {"fingerprint": self._fingerprint} for future in futures]
        except Exception as error:
            rows = [{"trouble": f"{type(error).__name__}: {error}"}]
        return pa.Table.from_pylist(rows, RESULT)

    def _run(self) -> None:
        try:
            for result in self._engine.answers(self._lines()):
                for future in self._waiting.pop(result.number):
                    future.set_result(result)
        except Exception as error:
            for future in itertools.chain.from_iterable(self._waiting.values()):
                future.set_exception(error)
            while True:
                self._inbox.get()[1].set_exception(error)

    def _lines(self) -> Iterator[Line | None]:
        while True:
            try:
                line, future = self._inbox.get(block=self._engine.idle)
            except queue.Empty:
                yield None
                continue
            self._waiting.setdefault(line.number, []).append(future)
            if len(self._waiting[line.number]) == 1:  # else a retry of a call that still runs
                yield line
