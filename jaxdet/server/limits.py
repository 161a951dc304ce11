"""What a request must pass before the app reads it: key, size and time of its body."""

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxdet.api.errors import ApiError
from jaxdet.arena.page import FILES as PAGE
from jaxdet.server.errors import respond
from jaxdet.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", *PAGE})
"""They need no key, and say nothing about any prompt."""
BODY_SECONDS = 60
"""How long a body may take to arrive."""


class Limits:
    """ASGI middleware: API keys, body size and time, and the count of requests.

    Args:
        api_keys: any of them opens the server; none of them leaves it open.
        max_body_bytes: larger bodies get 413, before or while they are read.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body_bytes: int, metrics: Metrics):
        self._app, self._metrics = app, metrics
        self._keys = [_digest(key.encode()) for key in api_keys]
        self._max = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                route = getattr(scope.get("route"), "path", "other")  # not the path: anyone can make those up
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            if scope["path"] not in OPEN_PATHS and not self._may_enter(headers.get(b"authorization", b"")):
                raise ApiError(
                    401,
                    "authorization must be 'Bearer' and one of the server's API keys; give the right one",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length[:20]) > self._max:
                raise self._too_large()
            body = await self._read(receive)
            await self._app(scope, _replay(body, receive), counted)
        except ApiError as error:
            if started:
                raise
            await respond(error)(scope, receive, counted)

    def _may_enter(self, header: bytes) -> bool:
        if not self._keys:
            return True
        scheme, _, key = header.partition(b" ")
        digest = _digest(key.strip())
        # All keys are compared, in a time that doesn't depend on where they differ.
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)

    async def _read(self, receive: Receive) -> bytes:
        """The whole body: an error in the midst of it would be taken for one of the JSON."""
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while (message := await receive())["type"] == "http.request":
                    body += message.get("body", b"")
                    if len(body) > self._max:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body took more than {BODY_SECONDS} s; send it faster") from None
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._max} bytes; send a smaller one")


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` once more from the start, with the body in one piece."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
