"""The `jaxdet` command: one file per group of commands."""

import os
import sys

import typer

from jaxdet.cli.arena import arena
from jaxdet.cli.batch import batch
from jaxdet.cli.generation import chat, generate
from jaxdet.cli.messages import complain
from jaxdet.cli.models import convert, info
from jaxdet.cli.proof import demo, verify
from jaxdet.cli.serving import serve
from jaxdet.cli.speed import bench

app = typer.Typer(
    help="Deterministic LLM inference in JAX: the same prompt, weights and seed give the same bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (generate, chat, batch, serve, arena, convert, verify, bench, info, demo):
    app.command()(command)


def main() -> None:
    """Runs the command; what goes wrong is said in one line."""
    try:
        app()
    except (ValueError, OSError, NotImplementedError, MemoryError) as error:
        complain(error)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("JAXDET_TRACEBACK"):
            raise
        complain(f"{type(error).__name__}: {error} (unexpected; set JAXDET_TRACEBACK=1 to see where)")
        sys.exit(1)
