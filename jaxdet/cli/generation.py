"""`jaxdet generate` and `jaxdet chat`."""

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from jaxdet.cli.messages import complain
from jaxdet.cli.options import (
    DEMO_MODEL,
    Backend,
    Dtype,
    Json,
    MaxModelLen,
    MaxTokens,
    MinP,
    Model,
    ModelArgument,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams


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
            complain(error)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]


def _stream(llm: LLM, prompt: Any, params: SamplingParams) -> str:
    shown = ""
    for output in llm.stream(prompt, params):
        text = output.outputs[0].text
        typer.echo(text[len(shown) :], nl=False)
        shown = text
    typer.echo()
    return shown
