"""`jaxdet arena`."""

import contextlib
from typing import Annotated

import typer

from jaxdet.cli.options import DEMO_MODEL, Backend, ModelArgument


def arena(
    model: ModelArgument = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; there is no password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8001,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    backend: Backend = None,
) -> None:
    """A page that answers one prompt many times under load: plain JAX beside jaxdet, to the last bit."""
    try:
        import uvicorn

        from jaxdet.arena.app import create_app
        from jaxdet.arena.run import Arena
    except ModuleNotFoundError as error:
        raise ValueError(f"arena needs {error.name}; pip install 'jaxdet[serve]'") from None
    app = create_app(Arena(model, dtype=dtype, backend=backend), host=host)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, server_header=False))
    app.state.stopping = lambda: server.should_exit
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once everything has ended
        server.run()
