"""From a line of the input to what the engine is asked, and from its outputs to a line of the output."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Never

from pydantic import BaseModel, ValidationError

from jaxdet.api.errors import ApiError, invalid
from jaxdet.api.fingerprint import fingerprint
from jaxdet.api.protocol import ChatCompletionRequest, CompletionRequest, Object, Sampling, Strict
from jaxdet.api.reader import Reader, Task
from jaxdet.api.responses import Answer
from jaxdet.batch.source import MAX_LINE_BYTES, Line
from jaxdet.llm import LLM
from jaxdet.outputs import RequestOutput

CHAT = "/v1/chat/completions"
OPENAI_FIELDS = frozenset(("custom_id", "method", "url", "body"))

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class OpenAILine(Strict):
    """A line of OpenAI's batch files."""

    custom_id: str
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: Object


class PromptLine(CompletionRequest):
    """A prompt with sampling parameters; text goes through the chat template, if the model has one."""

    id: str | int | None = None


class Result(NamedTuple):
    """A line of the output, or of the errors."""

    number: int
    """Of the request's line."""
    good: bool
    data: bytes
    """JSON, with its line end."""
    tokens: int
    """Sampled for it."""


@dataclasses.dataclass(frozen=True)
class Query:
    """A request that is ready for the engine."""

    number: int
    task: Task
    id: str | int | None
    """What the user calls it."""
    answer: Callable[[list[RequestOutput]], dict[str, Any]]


class Requests:
    """Reads lines and writes answers for one LLM. Both are functions of the line and the fingerprint alone.

    Args:
        name: what requests must call the model.
        defaults: fields of prompts that don't bring them.
    """

    def __init__(self, llm: LLM, name: str, defaults: dict[str, Any]):
        self._llm, self._name, self._defaults = llm, name, defaults
        self._reader = Reader(llm.tokenizer, llm.engine.vocab_size, name)
        self.constraint = self._reader.constraint
        self.fingerprint = fingerprint(llm)

    def read(self, line: Line) -> Query | Result:
        """The request of a line; its error if there is none."""
        user_id = None
        try:
            fields = {name: value for name, value in parse(line.data).items() if value is not None}
            user_id = _user_id(fields)
            if OPENAI_FIELDS & fields.keys():
                return self._openai(line, fields)
            return self._prompt(line, fields)
        except ValueError as error:
            return failure(line.number, user_id, ApiError(400, str(error)))
        except ApiError as error:
            return failure(line.number, user_id, error)

    def write(self, query: Query, outputs: list[RequestOutput]) -> Result:
        """The answer to a request."""
        tokens = sum(len(c.token_ids) for o in outputs for c in o.outputs)
        if any(c.finish_reason == "error" for o in outputs for c in o.outputs):
            return failure(query.number, query.id, ApiError(500, "the model's logits are not finite"), tokens)
        return Result(query.number, True, encode(query.answer(outputs)), tokens)

    def _openai(self, line: Line, fields: dict[str, Any]) -> Query:
        if isinstance(body := fields.get("body"), str):  # as Parquet has it
            fields = fields | {"body": parse(body.encode(errors="surrogatepass"))}
        outer = _validate(OpenAILine, fields)
        if outer.url == CHAT:
            task = self._reader.chat(_check(_validate(ChatCompletionRequest, outer.body)))
        else:
            task = self._reader.completion(_check(_validate(CompletionRequest, outer.body)))
        digest = self._digest(line)

        def answer(outputs: list[RequestOutput]) -> dict[str, Any]:
            return {
                "id": f"batch_req_{digest}",
                "custom_id": outer.custom_id,
                "response": {
                    "status_code": 200,
                    "request_id": f"req_{digest}",
                    "body": self._body(task, digest, outputs),
                },
                "error": None,
            }

        return Query(line.number, task, outer.custom_id, answer)

    def _prompt(self, line: Line, fields: dict[str, Any]) -> Query:
        body = _check(_validate(PromptLine, {"model": self._name} | self._defaults | fields))
        if isinstance(body.prompt, str):
            prompt: Any = self._llm.user_prompt(body.prompt)
            if not isinstance(prompt, str):
                body = body.model_copy(update={"prompt": prompt["prompt_token_ids"]})
        elif not isinstance(body.prompt[0], int):
            raise ApiError(400, "prompt must be one text or its token ids; use a line each", param="prompt")
        task = self._reader.completion(body)
        digest = self._digest(line)

        def answer(outputs: list[RequestOutput]) -> dict[str, Any]:
            whole = self._body(task, digest, outputs)
            kept = ("choices", "usage", "model", "system_fingerprint")
            return {"line": line.number, "id": body.id} | {name: whole[name] for name in kept}

        return Query(line.number, task, body.id, answer)

    def _body(self, task: Task, digest: str, outputs: list[RequestOutput]) -> dict[str, Any]:
        answer = Answer(
            task.kind,
            self._name,
            self.fingerprint,
            task.logprobs,
            task.tools,
            unique=digest,
            created=0,
        )
        whole = answer.whole(outputs)
        del whole["usage"]["prompt_tokens_details"]  # what the cache had depends on what else ran
        return whole

    def _digest(self, line: Line) -> str:
        """Stands in ids where a server has something random."""
        text = f"{self.fingerprint} {line.number} ".encode() + line.data.strip()
        return hashlib.sha256(text).hexdigest()[:24]


def failure(number: int, user_id: str | int | None, error: ApiError, tokens: int = 0) -> Result:
    """The line of the errors file."""
    return Result(number, False, encode({"line": number, "id": user_id} | error.body), tokens)


def encode(value: dict[str, Any]) -> bytes:
    """One line of JSON. Lone surrogates, which JSON can carry in, become the escapes that they came as."""
    return _dumps(value).encode(errors="backslashreplace") + b"\n"


def parse(data: bytes) -> dict[str, Any]:
    """A line's fields.

    Raises:
        ValueError: it is too long, no UTF-8 or no JSON object.
    """
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"the line has more than {MAX_LINE_BYTES >> 20} MiB; shorten it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is no UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the line is nested too deeply for JSON; flatten it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is no JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(value, dict):
        raise ValueError('the line is no JSON object; use {"prompt": "…"} or the format of OpenAI\'s batches')
    return value


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"the line is no JSON: it has no number {name}")


def _user_id(fields: dict[str, Any]) -> str | int | None:
    """What errors of a line are filed under, whatever else is wrong with it."""
    found = fields.get("custom_id", fields.get("id"))
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _validate[T: BaseModel](kind: type[T], fields: dict[str, Any]) -> T:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid([{**e, "loc": ("body", *e["loc"])} for e in found]) from None


def _check[S: Sampling](body: S) -> S:
    if body.stream:
        raise ApiError(400, "stream is for servers; leave it out of batches", param="stream")
    return body
