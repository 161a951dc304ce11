"""OpenAI's HTTP API over one LLM."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Self

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from jaxdet.api.errors import ApiError
from jaxdet.api.fingerprint import fingerprint
from jaxdet.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    ScoreRequest,
    TokenizeRequest,
)
from jaxdet.api.reader import Reader, Task
from jaxdet.api.responses import Answer, count_usage
from jaxdet.arena.page import add_page
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.client import EngineClient, Job
from jaxdet.server.errors import install_handlers
from jaxdet.server.limits import Limits
from jaxdet.server.metrics import Metrics
from jaxdet.server.stream import DisconnectedError, EventStream, collect
from jaxdet.tokenizer import Tokenizer

log = logging.getLogger("jaxdet.server")

SMALL_BODY = 2048
"""Bytes. A body that has no more is read at once, in a millisecond or less: a thread has its costs, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server lets its clients do."""

    served_model_name: str | None = None
    """The model's own name by default."""
    api_keys: Sequence[str] = ()
    """Without any, everybody may use the server."""
    max_tokens: int | None = None
    """The most tokens that one completion may have; None: what max_model_len leaves."""
    max_waiting: int = 256
    """Sequences that may wait; more get 429."""
    max_body_bytes: int = 4 * 2**20
    timeout: float = 600.0
    """Seconds that an answer may take."""
    stall_timeout: float = 30.0
    """Seconds that a client may take nothing of its answer, or be out of reach."""
    allow_origins: Sequence[str] = ()
    """Web pages that may use the server (CORS)."""
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_body_bytes", "timeout", "stall_timeout"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0; leave it out for the default")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting={self.max_waiting} must be at least 0; 0 lets none wait")
        if not all(key.strip() for key in self.api_keys):  # of a shell variable that isn't set, for one
            raise ValueError("an API key is empty and would let everybody in; give another, or none at all")


class Model(NamedTuple):
    """What the server knows of the model that the engine runs."""

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    fingerprint: str

    @classmethod
    def of(cls, llm: LLM) -> Self:
        return cls(
            llm.name,
            llm.tokenizer,
            llm.engine.vocab_size,
            llm.max_model_len,
            llm.engine.scheduler.max_num_seqs,
            fingerprint(llm),
        )


def create_app(
    model: Model, connection: socket.socket, settings: Settings, *, on_lost: Callable[[], None]
) -> FastAPI:
    """The server's app.

    Args:
        connection: to the `EngineHost` that runs the model.
        on_lost: called if the engine goes away by itself.
    """
    metrics = Metrics()
    engine = EngineClient(
        connection,
        model.tokenizer,
        metrics,
        capacity=model.max_num_seqs + settings.max_waiting,
        timeout=settings.timeout,
        on_lost=on_lost,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.stop()

    app = FastAPI(
        title="jaxdet",
        version=importlib.metadata.version("jaxdet"),
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.engine = engine
    app.add_middleware(
        Limits, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes, metrics=metrics
    )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    install_handlers(app)
    service = _Service(model, engine, settings)
    for method, path, endpoint in (
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{model:path}", service.model),
        ("POST", "/v1/completions", service.completions),
        ("POST", "/v1/chat/completions", service.chat_completions),
        ("POST", "/v1/score", service.score),
        ("POST", "/tokenize", service.tokenize),
        ("POST", "/detokenize", service.detokenize),
        ("GET", "/health", service.health),
        ("GET", "/ready", service.ready),
    ):
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    add_page(app, "server.source.js")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        body = metrics.render(await engine.ask())
        return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class _Service:
    """The endpoints."""

    def __init__(self, model: Model, engine: EngineClient, settings: Settings):
        self._model, self._engine, self._settings = model, engine, settings
        self._name = settings.served_model_name or model.name
        self._reader = Reader(model.tokenizer, model.vocab_size, self._name, max_tokens=settings.max_tokens)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model_card()]}

    async def model(self, model: str) -> dict[str, Any]:
        self._reader.check_model(model)
        return self._model_card()

    async def completions(self, body: CompletionRequest, http: Request) -> Any:
        return await self._answer(await _read(http, self._reader.completion, body), body, http)

    async def chat_completions(self, body: ChatCompletionRequest, http: Request) -> Any:
        return await self._answer(await _read(http, self._reader.chat, body), body, http)

    async def score(self, body: ScoreRequest, http: Request) -> Any:
        self._reader.check_model(body.model)
        prompts = await _read(http, self._reader.encode, body.input)
        job = Job(prompts, SamplingParams(prompt_logprobs=0), score=True)
        await self._engine.open(job)
        try:
            scores = await collect(self._engine, job, http)
        except DisconnectedError:
            return _nobody()
        data = [
            {
                "index": index,
                "object": "score",
                "token_ids": score.token_ids,
                "token_logprobs": [None, *score.logprobs],
            }
            for index, score in enumerate(scores)
        ]
        used = count_usage(sum(len(s.token_ids) for s in scores), 0, 0)
        return {
            "object": "list",
            "model": self._name,
            "system_fingerprint": self._model.fingerprint,
            "data": data,
            "usage": used,
        }

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            self._reader.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt or messages must be given, and not both; leave one out")
        if body.prompt is not None:
            tokens = await run_in_threadpool(
                self._model.tokenizer.encode, body.prompt, add_special_tokens=body.add_special_tokens
            )
        else:
            messages = [message.for_template() for message in body.messages or ()]
            tokens = (await run_in_threadpool(self._model.tokenizer.chat_prompt, messages))[
                "prompt_token_ids"
            ]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._model.max_model_len}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            self._reader.check_model(body.model)
        if any(token >= self._model.vocab_size for token in body.tokens):
            raise ApiError(400, f"tokens must be in [0, {self._model.vocab_size}); check the tokenizer")
        decode = functools.partial(self._model.tokenizer.decode, skip_special_tokens=False)
        return {"prompt": await run_in_threadpool(decode, body.tokens)}

    async def health(self) -> JSONResponse:
        return _state(self._engine.state.healthy)

    async def ready(self) -> JSONResponse:
        """Whether another request would be taken now."""
        return _state(self._engine.state.healthy and not self._engine.state.full)

    async def _answer(self, task: Task, body: Sampling, http: Request) -> Any:
        if self._settings.log_prompts:
            log.info("prompts: %s", json.dumps(task.prompts))
        job = Job(task.prompts, task.params, task.grammar, stream=bool(body.stream))
        await self._engine.open(job)
        answer = Answer(task.kind, self._name, self._model.fingerprint, task.logprobs, task.tools)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(self._engine, job, answer, usage=usage, patience=self._settings.stall_timeout)
        try:
            outputs = await collect(self._engine, job, http)
        except DisconnectedError:
            return _nobody()
        return JSONResponse(answer.whole(outputs))

    def _model_card(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": 0,
            "owned_by": "jaxdet",
            "max_model_len": self._model.max_model_len,
            "system_fingerprint": self._model.fingerprint,
        }


async def _read[T](http: Request, read: Callable[[Any], T], body: Any) -> T:
    """What `read` makes of a body, in a thread if it is long."""
    size = http.headers.get("content-length", "")
    if size.isdigit() and int(size) <= SMALL_BODY:
        return read(body)
    return await run_in_threadpool(read, body)


def _state(fine: bool) -> JSONResponse:
    return JSONResponse({"status": "ok" if fine else "unavailable"}, 200 if fine else 503)


def _nobody() -> Response:
    """The client closed the connection: nobody sees this."""
    return Response(status_code=499)
