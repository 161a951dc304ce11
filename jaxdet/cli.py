"""The `jaxdet` command."""

import dataclasses
import enum
import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

from jaxdet.bench import expected, measure, render
from jaxdet.checkpoints import open_checkpoint, save_checkpoint
from jaxdet.checkpoints.demo import NAME as DEMO_MODEL
from jaxdet.demo import run_demo
from jaxdet.llm import LLM
from jaxdet.models.registry import backend_of, family_of
from jaxdet.roofline.step import LABEL
from jaxdet.sampling_params import SamplingParams
from jaxdet.verify import verify as run_verify
from jaxdet.verify.hlo import lint_step
from jaxdet.verify.report import environment
from pallas_kernels.backend import resolve

app = typer.Typer(
    help="Deterministic LLM inference in JAX: the same prompt, weights and seed give the same bits.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


class Device(enum.StrEnum):
    cpu = "cpu"
    gpu = "gpu"
    tpu = "tpu"


class Format(enum.StrEnum):
    orbax = "orbax"
    safetensors = "safetensors"


Model = Annotated[
    str, typer.Option("--model", "-m", help=f"{DEMO_MODEL}, a folder, a .gguf file or a hub id.")
]
ModelArgument = Annotated[str, typer.Argument(help=f"{DEMO_MODEL}, a folder, a .gguf file or a hub id.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Backend = Annotated[str | None, typer.Option(help="Kernels; the device's own by default.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of each answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that make up this probability.")]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the most likely one.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same answer.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Tokens of prompt and answer together; the model's limit, at most 4096, by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; standard input without any.")] = None,
    model: Model = DEMO_MODEL,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    n: Annotated[int, typer.Option("-n", help="Answers for each prompt.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End the answer at this text; may be repeated.")
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: the most likely tokens to report.")
    ] = None,
    max_model_len: MaxModelLen = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Answers prompts (through the model's chat template, if it has one)."""
    texts = prompts or [sys.stdin.read().strip()]
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
    )
    llm = LLM(model, dtype=dtype, backend=backend, max_model_len=max_model_len)
    requests = [llm.user_prompt(text) for text in texts]
    if as_json:
        for output in llm.generate(requests, params):
            typer.echo(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
    elif len(requests) == n == 1:
        _stream(llm, requests[0], params)
    else:
        for text, output in zip(texts, llm.generate(requests, params), strict=True):
            for completion in output.outputs:
                typer.secho(f"> {text}", bold=True)
                typer.echo(completion.text.strip() + "\n")


@app.command()
def chat(
    model: ModelArgument = DEMO_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    max_model_len: MaxModelLen = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """A conversation: one line, one turn; the end of input ends it."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    llm = LLM(model, dtype=dtype, backend=backend, max_model_len=max_model_len)
    messages = [{"role": "system", "content": system}] if system else []
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            typer.secho("> ", bold=True, nl=False)
        if not (line := sys.stdin.readline()):
            break
        if not (text := line.strip()):
            continue
        turn = [*messages, {"role": "user", "content": text}]
        try:
            if as_json:
                (output,) = llm.chat(turn, params, use_tqdm=False)
                typer.echo(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
                answer = output.outputs[0].text
            else:
                answer = _stream(llm, llm.chat_prompt(turn), params)
        except ValueError as error:  # too long: the conversation stays as it was
            _complain(error)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


@app.command()
def serve(
    model: ModelArgument = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="The model's own name by default.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="JAXDET_API_KEY", help="May be repeated; without any, everybody may."),
    ] = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences at once; 64 on a CPU, 256 elsewhere.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of one completion.")] = None,
    max_waiting: Annotated[int, typer.Option(help="Sequences that may wait; more get 429.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(help="Larger bodies get 413.")] = 4 * 2**20,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 600.0,
    drain: Annotated[int, typer.Option(help="Seconds that requests have to end after SIGTERM.")] = 60,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web pages that may use the server; may be repeated.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of requests that bring none.")] = 0,
    dtype: Dtype = "auto",
    backend: Backend = None,
) -> None:
    """An OpenAI-compatible server; SIGTERM lets running requests end first."""
    try:
        from jaxdet.server.app import Settings
        from jaxdet.server.run import run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}; pip install 'jaxdet[serve]'") from None
    settings = Settings(
        served_model_name=served_model_name,
        api_keys=api_key or (),
        max_tokens=max_tokens,
        max_waiting=max_waiting,
        max_body_bytes=max_body_bytes,
        timeout=timeout,
        allow_origins=allow_origin or (),
        log_prompts=log_prompts,
    )
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        seed=seed,
    )
    run_server(llm, settings, host=host, port=port, drain=drain)


@app.command()
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


@app.command()
def verify(
    model: ModelArgument = DEMO_MODEL,
    output: Annotated[Path, typer.Option(help="JSON report.")] = Path("jaxdet-verify.json"),
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
        if as_json:
            raise ValueError("json is the report of compared bits; leave out --json or --hlo")
        _lint(model, dtype, backend)
        return
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output {output} must be a file in a folder that exists")
    report = run_verify(model, dtype=dtype, backend=backend)
    report.write_json(output)
    if as_json:
        typer.echo(output.read_text())
    else:
        Console().print(report.render(), f"report: {output}")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
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


@app.command()
def info(
    model: Annotated[
        str | None, typer.Argument(help="Model to describe; only the machine without one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine and a model are."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
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


@app.command()
def demo() -> None:
    """Answers a few prompts with SmolLM2-135M and proves that the bits do not move."""
    if not run_demo(Console()):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command; what goes wrong is said in one line."""
    try:
        app()
    except (ValueError, OSError, NotImplementedError) as error:
        _complain(error)
        sys.exit(1)
    except Exception as error:
        if os.environ.get("JAXDET_TRACEBACK"):
            raise
        _complain(f"{type(error).__name__}: {error} (unexpected; set JAXDET_TRACEBACK=1 to see where)")
        sys.exit(1)


def _lint(model: str, dtype: str, backend: str | None) -> None:
    llm = LLM(model, dtype=dtype, backend=backend, compile_at_start=True)
    report = lint_step(llm.engine.step_fn)
    Console().print(report.render())
    if not report.ok:
        raise typer.Exit(1)


def _complain(error: Exception | str) -> None:
    typer.secho(f"jaxdet: {' '.join(str(error).split())}", fg="red", err=True)


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> str:
    shown = ""
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        typer.echo(text[len(shown) :], nl=False)
        shown = text
    typer.echo()
    return shown
