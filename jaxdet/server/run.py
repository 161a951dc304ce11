"""`jaxdet serve`: the engine here, HTTP in processes beside it."""

import contextlib
import functools
import logging.config
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from jaxdet.grammar import JsonGrammars
from jaxdet.llm import LLM
from jaxdet.server.app import Model, Settings
from jaxdet.server.host import EngineHost
from jaxdet.server.http import BACKSTOP_SECONDS, LOGGING, Serve
from jaxdet.server.messages import pack
from jaxdet.server.metrics import FOLDER


def host_of(llm: LLM, connections: Sequence[socket.socket], settings: Settings) -> EngineHost:
    """What runs the LLM's engine for the other ends of connections."""

    @functools.cache
    def grammars() -> JsonGrammars:
        return JsonGrammars(llm.tokenizer, llm.engine.vocab_size)

    capacity = llm.engine.scheduler.max_num_seqs + settings.max_waiting
    return EngineHost(llm.engine, lambda grammar: grammars().start(*grammar), connections, capacity=capacity)


@contextlib.contextmanager
def http_processes(
    listeners: Sequence[socket.socket], asked: Serve
) -> Iterator[tuple[list[subprocess.Popen], list[socket.socket]]]:
    """A process that serves for every listener, and the connections on which they await an `EngineHost`.

    Each ends with its connection. The listeners are theirs then.
    """
    with tempfile.TemporaryDirectory(prefix="jaxdet-metrics-") as metrics:
        processes, connections = [], []
        for listener in listeners:
            listener.listen()
        for listener in listeners:
            here, there = socket.socketpair()
            numbers = [there.fileno(), listener.fileno()]
            with there:
                process = subprocess.Popen(
                    # -P: modules of the folder where somebody calls this are not the server's.
                    [sys.executable, "-P", "-m", "jaxdet.server.http", *map(str, numbers)],
                    pass_fds=numbers,
                    env=os.environ
                    | {"JAX_PLATFORMS": "cpu", FOLDER: metrics},  # the accelerator is the engine's
                    start_new_session=True,  # the terminal's signals come through here, once
                )
            processes.append(process)
            connections.append(here)
        for listener in listeners:
            listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):  # it ended at once; its exit status tells
                connection.sendall(pack(asked))
        try:
            yield processes, connections
        finally:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # closing alone isn't heard while somebody reads
                connection.close()
            for process in processes:
                process.wait()


def run_server(llm: LLM, settings: Settings, listeners: Sequence[socket.socket], *, drain: int) -> int:
    """Serves until it is told to stop; then no connection is accepted and those that are open may end.

    SIGINT and SIGTERM are ignored afterwards: the process is expected to end.

    Args:
        listeners: of `bind`: there are as many HTTP processes.
        drain: seconds that requests have to end; what still runs after that gets an error.

    Returns:
        The exit status: 0 if it was told to stop, 1 if a process ended by itself.
    """
    logging.config.dictConfig(LOGGING)
    processes: list[subprocess.Popen] = []
    told = _forward_signals(processes)
    with http_processes(listeners, Serve(Model.of(llm), settings, drain)) as (started, connections):
        processes += started
        if told:  # while they started
            for process in processes:
                process.terminate()
        # The main thread only waits: it could not heed a signal while it is in a step.
        run = host_of(llm, connections, settings).run
        engine = threading.Thread(target=run, name="engine", daemon=True)
        engine.start()
        statuses = list(_wait(processes))
        engine.join(BACKSTOP_SECONDS)
    # Python resets handlers before it takes its modules apart, which lasts most of a second with JAX: another SIGTERM
    # would be the exit status. It leaves alone what is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return 0 if all(status in (0, -signal.SIGTERM, -signal.SIGINT) for status in statuses) else 1


def _wait(processes: Sequence[subprocess.Popen]) -> Iterator[int]:
    """The exit statuses; once one has ended, whatever the reason, the others are told to."""
    with ThreadPoolExecutor(len(processes)) as pool:
        for ended in as_completed([pool.submit(process.wait) for process in processes]):
            yield ended.result()
            for process in processes:
                process.terminate()


def _forward_signals(processes: Sequence[subprocess.Popen]) -> list[int]:
    """Signals that end the server go to the processes that know of requests: the second Ctrl-C doesn't let them end.

    It stays so until they are gone: a signal that comes when all is over must not change the exit status.

    Returns:
        The signals so far; it grows, as `processes` may.
    """
    told: list[int] = []

    def forward(number: int, _: object) -> None:
        again = number == signal.SIGINT and number in told
        told.append(number)
        for process in processes:
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    return told
