"""`jaxdet verify` and `jaxdet demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jaxdet.cli.options import DEMO_MODEL, Backend, Dtype, ModelArgument
from jaxdet.demo import run_demo
from jaxdet.llm import LLM
from jaxdet.verify import verify as run_verify
from jaxdet.verify.hlo import lint_step
from jaxdet.verify.html import write_html
from jaxdet.verify.several_steps import STEPS


def verify(
    model: ModelArgument = DEMO_MODEL,
    output: Annotated[Path, typer.Option(help="JSON report.")] = Path("jaxdet-verify.json"),
    html: Annotated[Path | None, typer.Option(help="The report as a web page, too.")] = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON report instead of the table.")
    ] = False,
    hlo: Annotated[
        bool, typer.Option("--hlo", help="Lint the compiled programs instead; writes no report.")
    ] = False,
) -> None:
    """Certifies this machine: computes the same values in many ways and compares every bit."""
    if hlo:
        if as_json or html is not None:
            raise ValueError("json and html are the report of compared bits; leave them out, or --hlo")
        _lint(model, dtype, backend)
        return
    for name, path in (("output", output), ("html", html)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{name} {path} must be a file in a folder that exists")
    report = run_verify(model, dtype=dtype, backend=backend)
    report.write_json(output)
    if html is not None:
        write_html(report, html)
    if as_json:
        typer.echo(output.read_text())
    else:
        Console().print(report.render(), f"report: {output}" + (f", {html}" if html else ""))
    if not report.ok:
        raise typer.Exit(1)


def demo() -> None:
    """Answers a few prompts with SmolLM2-135M and proves that the bits do not move."""
    if not run_demo(Console()):
        raise typer.Exit(1)


def _lint(model: str, dtype: str, backend: str | None) -> None:
    llm = LLM(model, dtype=dtype, backend=backend, compile_at_start=True, num_scheduler_steps=STEPS)
    report = lint_step(llm.engine.step_fn)
    Console().print(report.render())
    if not report.ok:
        raise typer.Exit(1)
