"""The page and the runs behind it, over HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from jaxdet.api.errors import ApiError, invalid
from jaxdet.arena.page import add_page
from jaxdet.arena.run import Arena, Event
from jaxdet.arena.settings import Settings
from jaxdet.server.errors import api_error, install_handlers

MAX_BODY_BYTES = 64 * 1024
RUN_SECONDS = 3600
"""How long a run may take, and a client that doesn't read may hold it up."""
WAIT_SECONDS = 30
"""How long a run waits for the one before: when that is stopped, a program may just be compiling for it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(arena: Arena, *, host: str) -> FastAPI:
    """The arena's app.

    Args:
        host: where it listens. On a loopback address it answers to no other name, so that no page of another site
            can reach it through a name of its own (DNS rebinding).

    Returns:
        An app; its `state.stopping` may be set to what says whether a run should end early.
    """
    app = FastAPI(title="jaxdet arena", docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.state.stopping = lambda: False
    install_handlers(app)
    add_page(app, "arena.source.js")
    runs = _Runs(arena)
    app.add_api_route("/api/model", runs.model, methods=["GET"], response_model=None)
    app.add_api_route("/api/run", runs.run, methods=["POST"], response_model=None)
    return app


class _Runs:
    """One run at a time."""

    def __init__(self, arena: Arena):
        self._arena, self._busy = arena, asyncio.Lock()

    async def model(self) -> dict[str, Any]:
        return self._arena.facts

    async def run(self, http: Request) -> Response:
        settings = await _read(http)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._busy.acquire()
        except TimeoutError:
            raise ApiError(409, "another run is under way; wait for its end or stop it") from None
        try:
            events = await run_in_threadpool(self._arena.run, settings)
        except BaseException:
            self._busy.release()
            raise
        return _EventStream(_until(http.app.state.stopping, events), self._busy)


class _EventStream(StreamingResponse):
    """Server-sent events of a run. Whatever ends it, its requests leave the engine before another run begins."""

    def __init__(self, events: Generator[Event], busy: asyncio.Lock):
        super().__init__(
            _lines(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._events, self._busy = events, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with anyio.move_on_after(RUN_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._events.close)
            self._busy.release()


def _until(stopping: Callable[[], bool], events: Generator[Event]) -> Generator[Event]:
    """The events, until the server is told to stop."""
    with contextlib.closing(events):
        for event in events:
            if stopping():
                raise ApiError(503, "the server is stopping; run again when it is back")
            yield event


async def _lines(events: Generator[Event]) -> AsyncIterator[str]:
    try:
        async for event in iterate_in_threadpool(events):
            yield f"data: {json.dumps(event)}\n\n"
    except Exception as error:
        message = api_error(error).body["error"]["message"]
        yield f"data: {json.dumps({'event': 'error', 'message': message})}\n\n"
    else:
        yield f"data: {json.dumps({'event': 'end'})}\n\n"


async def _read(http: Request) -> Settings:
    """The settings in a request's body."""
    if http.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Other pages may send forms and text here, but not this.
        raise ApiError(415, "content-type must be application/json")
    length = http.headers.get("content-length", "")
    if not length.isdigit() or int(length[:20]) > MAX_BODY_BYTES:
        raise ApiError(
            413, f"the body must say its length, at most {MAX_BODY_BYTES} bytes; send a shorter prompt"
        )
    try:
        return Settings.model_validate_json(await http.body())
    except ValidationError as error:
        raise invalid([e | {"loc": ("body", *e["loc"])} for e in error.errors()]) from None
