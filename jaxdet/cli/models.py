"""`jaxdet convert` and `jaxdet info`."""

import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from jaxdet.checkpoints import open_checkpoint, save_checkpoint
from jaxdet.cli.options import Json
from jaxdet.models.registry import backend_of, family_of
from jaxdet.verify.report import environment
from pallas_kernels.backend import default_dtype, resolve


class Format(enum.StrEnum):
    orbax = "orbax"
    safetensors = "safetensors"


def convert(
    src: Annotated[str, typer.Argument(help="Model to read: as for --model elsewhere.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.safetensors,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")
    ] = None,
) -> None:
    """Writes a model as Orbax or safetensors, tokenizer included."""
    save_checkpoint(dst, open_checkpoint(src), format=format.value, dtype=dtype)
    typer.echo(f"wrote {dst}")


def info(
    model: Annotated[
        str | None, typer.Argument(help="Model to describe; only the machine without one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine and a model are."""
    dtype = default_dtype()
    facts: dict[str, Any] = {}
    backend = resolve(None)
    if model is not None:
        checkpoint = open_checkpoint(model, check_config=family_of)
        config = family_of(checkpoint.config).read_config(checkpoint.config)
        facts = {
            "model": checkpoint.name,
            "parameters": sum(math.prod(t.shape) for t in checkpoint.tensors.values()),
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        }
        backend = backend_of(config, jnp.dtype(dtype), None)
    facts |= environment(backend, dtype)
    if as_json:
        typer.echo(json.dumps(facts, default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", f"{value:,}" if name == "parameters" else str(value))
    Console().print(table)
