"""What goes wrong, in OpenAI's form."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

log = logging.getLogger("jaxdet.server")

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one line that names the argument, the limit and the remedy.
        param: the argument at fault.
        code: OpenAI's name of the error, if it has one.
        headers: to send with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        # Lone surrogates, which JSON can carry in, would not go out as UTF-8.
        message = message.encode(errors="backslashreplace").decode()
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """What a client is told of any exception: all of a ValueError, nothing of what nobody expected."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def install_handlers(app: FastAPI) -> None:
    """Every error of the app leaves it in OpenAI's form."""

    async def validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error.errors()).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def other(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, ValueError, Exception):
        app.add_exception_handler(kind, other)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of pydantic's complaints about the first wrong field the one that got furthest: of a union, the nearest form."""
    field = errors[0]["loc"][:2]
    worst = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    # Between the names and places of fields pydantic puts the names of types.
    path = [str(part) for part in worst["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    where = ".".join(part for part in path if part not in ("str", "int")) or "body"
    return ApiError(400, f"{where}: {worst['msg']}", param=where)
