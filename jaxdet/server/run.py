"""`jaxdet serve`: the engine here, HTTP in a process beside it."""

import contextlib
import functools
import logging.config
import os
import signal
import socket
import subprocess
import sys
import threading

from jaxdet.grammar import JsonGrammars
from jaxdet.llm import LLM
from jaxdet.server.app import Model, Settings
from jaxdet.server.host import EngineHost
from jaxdet.server.http import BACKSTOP_SECONDS, LOGGING, Serve
from jaxdet.server.messages import pack


def host_of(llm: LLM, connection: socket.socket) -> EngineHost:
    """What runs the LLM's engine for the other end of a connection."""

    @functools.cache
    def grammars() -> JsonGrammars:
        return JsonGrammars(llm.tokenizer, llm.engine.vocab_size)

    return EngineHost(llm.engine, lambda grammar: grammars().start(*grammar), connection)


def start_http(asked: Serve) -> tuple[subprocess.Popen, socket.socket]:
    """A process that serves, and the connection on which it awaits an `EngineHost`; it ends with the connection."""
    here, there = socket.socketpair()
    with there:
        process = subprocess.Popen(
            # -P: modules of the folder where somebody calls this are not the server's.
            [sys.executable, "-P", "-m", "jaxdet.server.http", str(there.fileno())],
            pass_fds=[there.fileno()],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the engine's
            start_new_session=True,  # the terminal's signals come through here, once
        )
    with contextlib.suppress(OSError):  # it ended at once; its exit status tells
        here.sendall(pack(asked))
    return process, here


def run_server(llm: LLM, settings: Settings, *, host: str, port: int, drain: int) -> int:
    """Serves until it is told to stop; then no connection is accepted and those that are open may end.

    Args:
        drain: seconds that they have; what still runs after that gets an error.

    Returns:
        The exit status: 0 if it was told to stop.
    """
    logging.config.dictConfig(LOGGING)
    process, connection = start_http(Serve(Model.of(llm), settings, host, port, drain))
    # The main thread only waits: it could not heed a signal while it is in a step.
    engine = threading.Thread(target=host_of(llm, connection).run, name="engine", daemon=True)
    engine.start()
    _forward_signals(process)
    status = process.wait()
    engine.join(BACKSTOP_SECONDS)
    return 0 if status in (0, -signal.SIGTERM, -signal.SIGINT) else 1


def _forward_signals(process: subprocess.Popen) -> None:
    """Signals that end the server go to the process that knows of requests: the second Ctrl-C doesn't let them end.

    It stays so until this process is gone: a signal that comes when all is over must not change its exit status.
    """
    told: list[int] = []

    def forward(number: int, _: object) -> None:
        again = number == signal.SIGINT and number in told
        told.append(number)
        process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
