"""The HTTP side of `jaxdet serve`, a process of its own: parsing, text and events take no time of the engine's.

`python -m jaxdet.server.http FD` serves what its first message says over the socket with that number.
"""

import asyncio
import contextlib
import socket
import sys
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from jaxdet.server.app import Model, Settings, create_app
from jaxdet.server.messages import receive

BACKSTOP_SECONDS = 5
"""After a drain: for the last words to requests that were cut off."""
LOGGING = LOGGING_CONFIG | {
    "loggers": LOGGING_CONFIG["loggers"]
    | {"jaxdet.server": {"handlers": ["default"], "level": "INFO", "propagate": False}}
}
"""Of both processes."""


class Serve(NamedTuple):
    """The first message."""

    model: Model
    settings: Settings
    host: str
    port: int
    drain: int


class Server(uvicorn.Server):
    """uvicorn, whose connections end when their client takes nothing any more or is gone without a word.

    Args:
        config: of uvicorn; its app comes from `create_app`.
        app: that app.
        patience: seconds until then.
        drain: seconds that running requests have to end once the server was told to stop.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, *, patience: float, drain: float):
        super().__init__(config)
        self._app, self._patience, self._drain = app, patience, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                lose_patience(listener, self._patience)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Uvicorn's own limit would cancel requests without an answer.
        asyncio.get_running_loop().call_later(self._drain, self._app.state.engine.cut_off)
        await super().shutdown(sockets)


def lose_patience(listener: socket.socket, seconds: float) -> None:
    """Lets the kernel end connections whose other side doesn't answer, or has no room for data, for so long.

    Connections get these options from the socket that listens. Without TCP_USER_TIMEOUT, which is Linux', only
    EventStream notices who takes no data, once the kernel's buffers are full.
    """
    whole = max(1, round(seconds / 4))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", whole),
        ("TCP_KEEPINTVL", whole),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def serve(connection: socket.socket, asked: Serve) -> bool:
    """Serves until SIGINT, SIGTERM or the engine's end; whether it came to that without a fault."""
    lost: list[bool] = []

    def stop() -> None:
        lost.append(True)
        server.should_exit = True

    app = create_app(asked.model, connection, asked.settings, on_lost=stop)
    config = uvicorn.Config(
        app,
        host=asked.host,
        port=asked.port,
        timeout_graceful_shutdown=asked.drain + BACKSTOP_SECONDS,
        server_header=False,
        log_config=LOGGING,
    )
    server = Server(config, app, patience=asked.settings.stall_timeout, drain=asked.drain)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises again what it has already heeded
        server.run()
    return server.started and not lost


def main() -> int:
    connection = socket.socket(fileno=int(sys.argv[1]))
    asked = receive(connection)
    return asked is None or not serve(connection, asked)


if __name__ == "__main__":
    sys.exit(main())
