"""What goes wrong with a request, in OpenAI's form."""

from collections.abc import Mapping, Sequence
from typing import Any

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


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found wrong with a body.

    Args:
        errors: its complaints; each "loc" begins with a word of its own before the fields. Of those about the first
            wrong field the one that got furthest is told: of a union, the nearest form.
    """
    field = errors[0]["loc"][:2]
    worst = max((e for e in errors if e["loc"][:2] == field), key=lambda e: len(e["loc"]))
    # Between the names and places of fields pydantic puts the names of types.
    path = [str(part) for part in worst["loc"][1:] if isinstance(part, int) or part.isidentifier()]
    where = ".".join(part for part in path if part not in ("str", "int")) or "body"
    return ApiError(400, f"{where}: {worst['msg']}", param=where)
