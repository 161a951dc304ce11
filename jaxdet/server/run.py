"""Runs the app in uvicorn until SIGINT or SIGTERM."""

import asyncio
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from jaxdet.llm import LLM
from jaxdet.server.app import Settings, create_app

BACKSTOP_SECONDS = 5
"""After a drain: for the last words to requests that were cut off."""


class Server(uvicorn.Server):
    """uvicorn, whose connections end when their client takes nothing any more or is gone without a word.

    Args:
        config: of uvicorn.
        app: the one that it runs, from `create_app`.
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
        asyncio.get_running_loop().call_later(self._drain, self._app.state.engine_loop.cut_off)
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


def run_server(llm: LLM, settings: Settings, *, host: str, port: int, drain: int) -> None:
    """Serves until it is told to stop; then no connection is accepted and those that are open may end.

    Args:
        drain: seconds that they have; what still runs after that gets an error.
    """
    ours = {"jaxdet.server": {"handlers": ["default"], "level": "INFO", "propagate": False}}
    app = create_app(llm, settings)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=drain + BACKSTOP_SECONDS,
        server_header=False,
        log_config=LOGGING_CONFIG | {"loggers": LOGGING_CONFIG["loggers"] | ours},
    )
    server = Server(config, app, patience=settings.stall_timeout, drain=drain)
    server.run()
    if not server.started:
        sys.exit(1)
