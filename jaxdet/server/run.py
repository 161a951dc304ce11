"""`jaxdet serve`: the engine here, HTTP in a process beside it."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

from jaxdet.grammar import JsonGrammars
from jaxdet.llm import LLM
from jaxdet.server.app import Model, Settings
from jaxdet.server.host import EngineHost
from jaxdet.server.http import Serve
from jaxdet.server.messages import pack

STOPPING = signal.SIGINT, signal.SIGTERM


def host_of(llm: LLM, connection: socket.socket) -> EngineHost:
    """What runs the LLM's engine for the other end of a connection."""

    @functools.cache
    def grammars() -> JsonGrammars:
        return JsonGrammars(llm.tokenizer, llm.engine.vocab_size)

    return EngineHost(llm.engine, lambda grammar: grammars().start(grammar, "grammar"), connection)


def start_http(asked: Serve) -> tuple[subprocess.Popen, socket.socket]:
    """A process that serves, and the connection on which it awaits an `EngineHost`; it ends with the connection."""
    here, there = socket.socketpair()
    here.sendall(pack(asked))
    with there:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxdet.server.http", str(there.fileno())],
            pass_fds=[there.fileno()],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the engine's
            process_group=0,  # so that Ctrl-C reaches it once, through here
        )
    return process, here


def run_server(llm: LLM, settings: Settings, *, host: str, port: int, drain: int) -> int:
    """Serves until it is told to stop; then no connection is accepted and those that are open may end.

    Args:
        drain: seconds that they have; what still runs after that gets an error.

    Returns:
        The exit status: 0 if it was told to stop.
    """
    process, connection = start_http(Serve(Model.of(llm), settings, host, port, drain))
    with _forwarding(process):
        host_of(llm, connection).run()
        status = process.wait()
    return 0 if -status in STOPPING else 1 if status else 0


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen) -> Iterator[None]:
    """Signals that end the server go to the process that knows of requests."""
    before = {number: signal.signal(number, lambda n, _: process.send_signal(n)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
