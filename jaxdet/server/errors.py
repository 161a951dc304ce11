"""Errors as HTTP answers."""

import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jaxdet.api.errors import ApiError, invalid

log = logging.getLogger("jaxdet.server")

JSON_TYPE = re.compile(r"\s*application/([^;]*\+)?json\s*(;|$)", re.IGNORECASE)

UNREADABLE = (
    "the body is no UTF-8, is nested too deeply or has a number of thousands of digits; "
    "send JSON without any of these"
)


def respond(error: ApiError) -> JSONResponse:
    """The error as an answer."""
    return JSONResponse(error.body, error.status, headers=error.headers)


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

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        kind = request.headers.get("content-type", "")
        if not JSON_TYPE.match(kind):  # then FastAPI didn't read the body
            message = f"Content-Type is {kind!r} and must be 'application/json'; set that header"
            return respond(ApiError(415, message))
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][1] + 1}"
            return respond(ApiError(400, message))
        return respond(invalid(error.errors()))

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return respond(ApiError(404, "there is no such path; GET /openapi.json lists all"))
        if error.status_code == 400:  # FastAPI's, about any body that Python can't read
            return respond(ApiError(400, UNREADABLE))
        return respond(ApiError(error.status_code, str(error.detail), headers=error.headers))

    async def other(_: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))

    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    for kind in (ApiError, ValueError, Exception):
        app.add_exception_handler(kind, other)
