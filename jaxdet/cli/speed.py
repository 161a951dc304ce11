"""`jaxdet bench`."""

import enum
import json
from typing import Annotated

import jax
import typer
from rich.console import Console

from jaxdet.bench import expected, measure, render
from jaxdet.cli.options import DEMO_MODEL, Json, ModelArgument
from jaxdet.roofline.step import LABEL


class Device(enum.StrEnum):
    cpu = "cpu"
    gpu = "gpu"
    tpu = "tpu"


def bench(
    model: ModelArgument = DEMO_MODEL,
    device: Annotated[
        Device | None, typer.Option(help="What to measure; what JAX runs on by default.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of a decode step; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measures decode steps and prefill, beside what the chip's limits allow."""
    batches = batch or [1, 8]
    if min(batches) < 1:
        raise ValueError(f"batch={min(batches)} must be at least 1")
    here = jax.default_backend()
    missing = None if device == here else device
    if missing == Device.cpu:
        raise ValueError(f"device=cpu, but JAX runs on {here} here; set JAX_PLATFORMS=cpu")
    rows = measure(model, batches) if missing is None else expected(model, batches, missing.value)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
    else:
        Console().print(render(rows))
    if missing is not None:
        typer.echo(f"no {missing.upper()} is here to measure: every figure is {LABEL}", err=as_json)
