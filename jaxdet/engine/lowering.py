"""Lowers programs in processes beside the engine's: one process lowers one program at a time, as Python's lock has it.

Such a process runs `main`: it reads what `beside` pickles, then numbers of programs, a line each, and answers each with
a line once that program is in the folder. It needs no accelerator and no weights.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
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

PLATFORM = "cuda"
"""The only one whose programs are slow to lower."""
WORTH = 4
"""Programs that one process more must have to lower."""
MOST_PROCESSES = 8


class _Model(NamedTuple):
    graph: nnx.GraphDef
    state: nnx.State
    cache: KVCache
    last_tokens: jax.Array

    @classmethod
    def of(cls, programs: Programs) -> "_Model":
        """Shapes in the place of arrays."""
        step, cache, last = programs
        return cls(step.graph, *shapes_of((step.state, cache, last)))

    def programs(self) -> Programs:
        return Programs(Step(nnx.merge(self.graph, self.state)), self.cache, self.last_tokens)


class _Work(NamedTuple):
    target: _Model
    drafter: _Model | None
    buckets: Buckets
    table: int
    steps: int
    kept_in: Path
    platform: str
    settings: dict[str, Any]


@contextlib.contextmanager
def beside(wanted: Wanted) -> Iterator[Callable[[int], object]]:
    """Starts processes if they are worth it; they end with the context.

    Yields:
        What waits until a program, by its number in `wanted.jobs`, is lowered, or until no process will do it. Then
        this one has to.
    """
    kept_in = lowered_cache.folder(wanted.target.step.backend)
    missing = [] if kept_in is None else _missing(wanted, kept_in)
    count = min(len(missing) // WORTH, (os.cpu_count() or 1) // 2, MOST_PROCESSES)
    if kept_in is None or count < 2:
        yield lambda number: None
        return
    work = _Work(
        _Model.of(wanted.target),
        None if wanted.drafter is None else _Model.of(wanted.drafter),
        wanted.buckets,
        wanted.table,
        wanted.steps,
        kept_in,
        PLATFORM,
        lowered_cache.settings(),
    )
    pickled = pickle.dumps(work)
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in missing:
        left.put(number)
    over = {number: threading.Event() for number in missing}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_process()) for _ in range(count)]
        stack.callback(lambda: [process.kill() for process in processes])  # before they are waited for
        feeders = [
            threading.Thread(target=_feed, args=(p, pickled, left, over), daemon=True) for p in processes
        ]

        def give_up() -> None:
            """Nobody is left to lower what isn't lowered yet."""
            for feeder in feeders:
                feeder.join()
            for event in over.values():
                event.set()

        for feeder in feeders:
            feeder.start()
        threading.Thread(target=give_up, daemon=True).start()
        yield lambda number: number in over and over[number].wait()


def _missing(wanted: Wanted, kept_in: Path) -> list[int]:
    return [i for i, job in enumerate(wanted.jobs(lambda step: step.seeker(kept_in))) if job()]


def _process() -> subprocess.Popen:
    return subprocess.Popen(
        # -P: modules of the folder where somebody calls this are not its own.
        [sys.executable, "-P", "-c", "from jaxdet.engine.lowering import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the engine's
        start_new_session=True,  # Ctrl-C is the engine's, too
    )


def _feed(
    process: subprocess.Popen, work: bytes, left: queue.SimpleQueue, over: dict[int, threading.Event]
) -> None:
    """Gives a process one program after another."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError, ValueError, queue.Empty):  # it died, or the context is over
        process.stdin.write(work)
        while True:
            number = left.get_nowait()
            try:
                process.stdin.write(b"%d\n" % number)
                process.stdin.flush()
                if not process.stdout.readline():
                    return
            finally:
                over[number].set()


def main() -> None:
    work: _Work = pickle.load(sys.stdin.buffer)
    for name, value in work.settings.items():
        jax.config.update(name, value)
    drafter = None if work.drafter is None else work.drafter.programs()
    wanted = Wanted(work.target.programs(), drafter, work.buckets, work.table, work.steps)
    jobs = wanted.jobs(lambda step: step.lowerer(work.kept_in, work.platform))
    for line in sys.stdin.buffer:
        with contextlib.suppress(Exception):  # the engine will lower it, and say what is wrong
            jobs[int(line)]()
        print(flush=True)
