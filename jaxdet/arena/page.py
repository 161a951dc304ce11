"""The page's files, for the arena and for the server."""

import importlib.resources

from fastapi import FastAPI, Request
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/arena.js": ("arena.js", "text/javascript; charset=utf-8"),
    "/arena.css": ("arena.css", "text/css; charset=utf-8"),
    "/source.js": ("", "text/javascript; charset=utf-8"),
}
"""By path the file and its type; where runs come from differs."""
HEADERS = {
    # The page runs its own script and loads nothing from elsewhere, whatever a model says.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, source: str) -> None:
    """Serves the page at /.

    Args:
        source: the script that runs it: "arena.source.js" or "server.source.js".
    """

    async def file(http: Request) -> Response:
        name, kind = FILES[http.url.path]
        content = importlib.resources.files("jaxdet.arena").joinpath("page", name or source).read_bytes()
        return Response(content, media_type=kind, headers=HEADERS)

    for path in FILES:
        app.add_api_route(path, file, methods=["GET"], response_model=None, include_in_schema=False)
