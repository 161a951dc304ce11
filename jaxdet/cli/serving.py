"""`jaxdet serve`."""

import os
from typing import Annotated

import typer

from jaxdet.cli.options import DEMO_MODEL, Backend, Dtype, MaxModelLen, ModelArgument
from jaxdet.llm import LLM


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
    stall_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a client may take nothing, or be out of reach.")
    ] = 30.0,
    http_processes: Annotated[
        int | None,
        typer.Option(min=1, help="On one port; by default one for every 4 CPU cores, at least 1, at most 4."),
    ] = None,
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
        from jaxdet.server.listeners import bind, default_processes
        from jaxdet.server.run import run_server
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}; pip install 'jaxdet[serve]'") from None
    if not os.environ.get("JAXDET_API_KEY", "key").strip():  # typer takes an empty one for none
        raise ValueError("JAXDET_API_KEY is empty; unset it to let everybody in, or set a key")
    settings = Settings(
        served_model_name=served_model_name,
        api_keys=api_key or (),
        max_tokens=max_tokens,
        max_waiting=max_waiting,
        max_body_bytes=max_body_bytes,
        timeout=timeout,
        stall_timeout=stall_timeout,
        allow_origins=allow_origin or (),
        log_prompts=log_prompts,
    )
    # Before the model, which takes a while.
    listeners = bind(host, port, http_processes or default_processes())
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        seed=seed,
    )
    raise typer.Exit(run_server(llm, settings, listeners, drain=drain))
