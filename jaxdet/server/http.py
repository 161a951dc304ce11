"""The HTTP side of `jaxdet serve`, in processes of its own: parsing, text and events take no time of the engine's.

`python -m jaxdet.server.http CONNECTION LISTENER`, two numbers of sockets, serves what the first message over the
connection says.
"""

import asyncio
import contextlib
import gc
import logging
import socket
import sys
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from jaxdet.server.app import Model, Settings, create_app
from jaxdet.server.listeners import lose_patience, url_of
from jaxdet.server.messages import receive

BACKSTOP_SECONDS = 5
"""After a drain: for the last words to requests that were cut off."""
LOGGING = LOGGING_CONFIG | {
    "loggers": LOGGING_CONFIG["loggers"]
    | {"jaxdet.server": {"handlers": ["default"], "level": "INFO", "propagate": False}}
}
"""Of all processes."""
log = logging.getLogger("jaxdet.server")


class Serve(NamedTuple):
    """The first message."""

    model: Model
    settings: Settings
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
        for listener in sockets or ():
            lose_patience(listener, self._patience)
        await super().startup(sockets)
        for listener in sockets or ():
            log.info("running on %s; Ctrl-C ends it", url_of(listener))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Uvicorn's own limit would cancel requests without an answer.
        asyncio.get_running_loop().call_later(self._drain, self._app.state.engine.cut_off)
        await super().shutdown(sockets)


def serve(connection: socket.socket, listener: socket.socket, asked: Serve) -> bool:
    """Serves until SIGINT, SIGTERM or the engine's end; whether it came to that without a fault."""
    lost: list[bool] = []

    def stop() -> None:
        lost.append(True)
        server.should_exit = True

    app = create_app(asked.model, connection, asked.settings, on_lost=stop)
    config = uvicorn.Config(
        app,
        timeout_graceful_shutdown=asked.drain + BACKSTOP_SECONDS,
        server_header=False,
        log_config=LOGGING,
    )
    server = Server(config, app, patience=asked.settings.stall_timeout, drain=asked.drain)
    gc.freeze()  # hundreds of thousands of objects that stay needn't be looked through while requests wait
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises again what it has already heeded
        server.run([listener])
    return server.started and not lost


def main() -> int:
    connection, listener = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    asked = receive(connection)
    return asked is None or not serve(connection, listener, asked)


if __name__ == "__main__":
    sys.exit(main())
