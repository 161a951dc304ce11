"""Runs the app in uvicorn until SIGINT or SIGTERM."""

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from jaxdet.llm import LLM
from jaxdet.server.app import Settings, create_app


def run_server(llm: LLM, settings: Settings, *, host: str, port: int, drain: int) -> None:
    """Serves until it is told to stop; then no connection is accepted and those that are open may end.

    Args:
        drain: seconds that they have; what still runs after that is aborted.
    """
    ours = {"jaxdet.server": {"handlers": ["default"], "level": "INFO", "propagate": False}}
    uvicorn.run(
        create_app(llm, settings),
        host=host,
        port=port,
        timeout_graceful_shutdown=drain,
        server_header=False,
        log_config=LOGGING_CONFIG | {"loggers": LOGGING_CONFIG["loggers"] | ours},
    )
