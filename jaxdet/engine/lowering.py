"""Lowers programs in processes beside the engine's: one process lowers one program at a time, as Python's lock has it.

Such a process runs `main`: it reads what `beside` pickles, then numbers of programs, a line each, and answers each with
a line once that program is in the folder. It needs no accelerator and no weights.
"""

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxdet.engine import lowered_cache
from jaxdet.engine.buckets import Buckets
from jaxdet.engine.step import Step
from jaxdet.engine.wanted import Programs, Wanted, shapes_of
from jaxdet.models.layers import KVCache
from jaxdet.processors import usable_cpus
from pallas_kernels.matmul import tuning_sm90
from pallas_kernels.proven import Tiles

log = logging.getLogger(__name__)

PLATFORM = "cuda"
"""The only one whose programs are slow to lower."""
WORTH = 4
"""Programs that one process more must have to lower."""
MOST_PROCESSES = 8
PATIENCE_SECONDS = 300
"""The longest that a program waits for its turn and for being lowered."""


class _Model(NamedTuple):
    graph: nnx.GraphDef
    state: nnx.State
    cache: KVCache
    last_tokens: jax.Array
    tiles: Tiles

    @classmethod
    def of(cls, programs: Programs) -> "_Model":
        """Shapes in the place of arrays."""
        step, cache, last = programs
        return cls(step.graph, *shapes_of((step.state, cache, last)), tiles=step.tiles)

    def programs(self) -> Programs:
        step = Step(nnx.merge(self.graph, self.state), self.tiles)
        return Programs(step, self.cache, self.last_tokens)


class _Work(NamedTuple):
    target: _Model
    drafter: _Model | None
    buckets: Buckets
    table: int
    steps: int
    kept_in: Path
    platform: str
    device_kind: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, wanted: Wanted, kept_in: Path) -> "_Work":
        target, drafter, buckets, table, steps = wanted
        models = _Model.of(target), None if drafter is None else _Model.of(drafter)
        kind = jax.devices()[0].device_kind
        return cls(*models, buckets, table, steps, kept_in, PLATFORM, kind, lowered_cache.settings())


@contextlib.contextmanager
def beside(wanted: Wanted) -> Iterator[Callable[[int], object]]:
    """Starts processes if they are worth it; they end with the context.

    Yields:
        What waits until a program, by its number in `wanted.jobs`, is lowered, or until no process is likely to do it.
        Then this one has to.
    """
    kept_in = lowered_cache.folder(wanted.target.step.backend)
    missing = [] if kept_in is None or not _writable(kept_in) else _missing(wanted, kept_in)
    count = min(len(missing) // WORTH, usable_cpus() // 2, MOST_PROCESSES)
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in missing:
        left.put(number)
    over = {number: threading.Event() for number in missing}

    def give_up() -> None:
        for event in over.values():
            event.set()

    def wait(number: int) -> None:
        if number in over and not over[number].wait(PATIENCE_SECONDS):
            log.warning(
                "processes that lower programs don't answer; the engine does it itself, which takes minutes"
            )
            give_up()

    def feed(process: subprocess.Popen) -> None:
        _feed(process, work, left, over)
        with done:
            fed.append(process)
            if len(fed) == len(processes):
                give_up()

    processes, fed, done, work = [], [], threading.Lock(), b""
    try:
        if kept_in is not None and count > 1:
            work = pickle.dumps(_Work.of(wanted, kept_in))
            for _ in range(count):
                processes.append(_process())
    except Exception as error:
        log.warning("no processes lower programs beside the engine: %s", error)
    if not processes:
        give_up()
    try:
        for process in list(processes):
            threading.Thread(target=feed, args=(process,), daemon=True).start()
        yield wait
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _writable(folder: Path) -> bool:
    """Whether what is lowered can be kept there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _missing(wanted: Wanted, kept_in: Path) -> list[int]:
    return [i for i, job in enumerate(wanted.jobs(lambda step: step.seeker(kept_in))) if job()]


def _process() -> subprocess.Popen:
    return subprocess.Popen(
        # -P: modules of the folder where somebody calls this are not its own.
        [sys.executable, "-P", "-c", "from jaxdet.engine.lowering import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what it fails at the engine fails at, too, and says so
        bufsize=0,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the engine's
        start_new_session=True,  # Ctrl-C is the engine's, too
    )


def _feed(
    process: subprocess.Popen, work: bytes, left: queue.SimpleQueue, over: dict[int, threading.Event]
) -> None:
    """Gives a process one program after another, until none is left or it doesn't answer."""
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout, contextlib.suppress(OSError, ValueError, queue.Empty):
        rest = memoryview(work)
        while rest:
            rest = rest[process.stdin.write(rest) :]
        while True:
            number = left.get_nowait()
            try:
                process.stdin.write(b"%d\n" % number)
                if not process.stdout.readline():
                    return
            finally:
                over[number].set()


def main() -> None:
    work: _Work = pickle.load(sys.stdin.buffer)
    for name, value in work.settings.items():
        jax.config.update(name, value)
    tuning_sm90.assume(work.device_kind)
    drafter = None if work.drafter is None else work.drafter.programs()
    wanted = Wanted(work.target.programs(), drafter, work.buckets, work.table, work.steps)
    jobs = wanted.jobs(lambda step: step.lowerer(work.kept_in, work.platform))
    for line in sys.stdin.buffer:
        with contextlib.suppress(Exception):  # the engine will lower it, and say what is wrong
            jobs[int(line)]()
        print(flush=True)
