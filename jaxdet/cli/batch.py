"""`jaxdet batch`."""

import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer

from jaxdet.batch.local import answer_here
from jaxdet.batch.request import Result
from jaxdet.batch.run import RunError, Settings, Summary, run_batch
from jaxdet.cli.messages import complain
from jaxdet.cli.options import (
    DEMO_MODEL,
    Backend,
    Dtype,
    MaxModelLen,
    MaxTokens,
    MinP,
    Model,
    Temperature,
    TopK,
    TopP,
)

SOME_LINES_FAILED = 3
INTERRUPTED = 130


def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Requests: a .jsonl or .parquet file.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Answers: a .jsonl or .parquet file.")],
    model: Model = DEMO_MODEL,
    errors: Annotated[
        Path | None, typer.Option(help="What is wrong with other lines; OUT with .errors.jsonl by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and what is left of another run that writes it.")
    ] = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model; its own name by default.")
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of requests that bring none.")] = 0,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences at once; 64 on a CPU, 256 elsewhere. Changes no answer.")
    ] = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    ray: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a Ray cluster, or auto: the one that this machine belongs to."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --ray: engines, one on each GPU.")] = 1,
) -> None:
    """Answers a file of requests; stopped at any moment, the same command goes on to the same bytes.

    Sampling options are for prompts that don't bring them; lines in OpenAI's batch format have OpenAI's defaults. The
    exit status is 3 if lines are in the errors file, 1 if the run could not be done, and 130 after Ctrl-C.
    """
    settings = Settings(
        model=model,
        served_model_name=served_model_name,
        dtype=dtype,
        backend=backend,
        max_model_len=max_model_len,
        seed=seed,
        defaults={
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
        },
    )
    answers = functools.partial(_answer(ray, workers), settings, max_num_seqs=max_num_seqs)
    errors = errors or output.with_suffix(".errors.jsonl")
    try:
        found = run_batch(source, output, errors, settings, answers, overwrite=overwrite)
    except KeyboardInterrupt as stop:
        complain(str(stop) or "stopped; the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    except RunError as error:
        complain(error)
        raise typer.Exit(1) from None
    typer.echo(_report(found, output, errors), err=True)
    if found.failed:
        raise typer.Exit(SOME_LINES_FAILED)


def _answer(address: str | None, workers: int) -> Callable[..., Generator[tuple[str, Result]]]:
    """Who answers: an engine in this process, or workers on a cluster."""
    if address is None:
        if workers != 1:
            raise ValueError(f"workers={workers} need a cluster; add --ray auto")
        return answer_here
    try:
        from jaxdet.batch.cluster import answer_on_ray
    except ModuleNotFoundError as error:
        raise ValueError(f"ray needs {error.name}; pip install 'jaxdet[ray]'") from None
    return functools.partial(answer_on_ray, address=address, workers=workers)


def _report(found: Summary, output: Path, errors: Path) -> str:
    """What was done, in one line."""
    text = f"{found.requests - found.failed:,} answers in {output}"
    if found.failed:
        text += f", {found.failed:,} errors in {errors}"
    if not found.answered:
        return f"{text}; nothing was left to do"
    rate = found.tokens / found.seconds
    return f"{text}; {found.tokens:,} tokens in {found.seconds:,.1f} s, {rate:,.0f} a second"
