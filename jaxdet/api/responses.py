"""The answers of OpenAI's API: whole ones as dictionaries, chunks of a stream as events."""

import dataclasses
import functools
import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from jaxdet.api.tools import Call, ToolParser, ToolUse
from jaxdet.outputs import CompletionOutput, Logprob, RequestOutput

LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON has no number for."""
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclasses.dataclass(frozen=True)
class Answer:
    """What all chunks of an answer share."""

    kind: str
    """"text_completion" or "chat.completion"."""
    model: str
    fingerprint: str
    logprobs: int | None
    """How many of the most likely tokens to list."""
    tools: ToolUse | None = None
    """The tool calls that it may hold."""
    unique: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """What its id has after OpenAI's prefix."""
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    @property
    def id(self) -> str:
        return f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.unique}"

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The answer to a request without streaming."""
        per_prompt = len(outputs[0].outputs)
        choices = [
            self._choice(place * per_prompt + completion.index, completion)
            for place, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return self._envelope(self.kind, choices) | {"usage": usage(outputs)}

    def chunk(self, index: int, completion: CompletionOutput, offset: int) -> str:
        """The event of what came since the last one; `offset` is the length of the text before it."""
        return self._event(self._choice(index, completion, offset))

    def delta(
        self, index: int, completion: CompletionOutput, delta: dict[str, Any], reason: str | None
    ) -> str:
        """The event of what came since the last one in a chat."""
        logprobs = self._logprobs(completion, 0)
        return self._event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def opening(self, index: int) -> str:
        """The first event of a choice of a chat: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._event({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def closing(self, counted: dict[str, Any]) -> str:
        """The last event: no choices, only what was used."""
        return f'{self._head}],"usage":{_json(counted)}}}\n\n'

    def _event(self, choice: dict[str, Any]) -> str:
        return f"{self._head}{_json(choice)}]}}\n\n"

    @functools.cached_property
    def _head(self) -> str:
        """How every event begins; writing it anew each time took longer than the rest."""
        kind = "chat.completion.chunk" if self.is_chat else self.kind
        return f"data: {_json(self._envelope(kind, [])).removesuffix(']}')}"

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def tool_call(self, index: int, place: int, call: Call) -> dict[str, Any]:
        """A call of a choice; `place` counts them."""
        # Mistral's templates want nine letters or digits.
        name = hashlib.sha256(f"{self.id}/{index}/{place}".encode()).hexdigest()[:9]
        return {"id": name, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _choice(self, index: int, completion: CompletionOutput, offset: int = 0) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        reason = completion.finish_reason
        if self.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
            if self.tools is not None:
                piece = self.tools.parser().feed(completion.text, last=True)
                if piece.calls:
                    calls = [self.tool_call(index, place, call) for place, call in enumerate(piece.calls)]
                    message |= {"content": piece.content or None, "tool_calls": calls}
                    reason = "tool_calls" if reason == "stop" else reason
            choice["message"] = message
        else:
            choice["text"] = completion.text
        return choice | {"logprobs": self._logprobs(completion, offset), "finish_reason": reason}

    def _logprobs(self, completion: CompletionOutput, offset: int) -> dict[str, Any] | None:
        if completion.logprobs is None or self.logprobs is None:
            return None
        pairs = list(zip(completion.token_ids, completion.logprobs, strict=True))
        if self.is_chat:
            return {
                "content": [
                    _token(entry[token])
                    | {"top_logprobs": [_token(e) for e in entry.values() if e.rank <= self.logprobs]}
                    for token, entry in pairs
                ],
                "refusal": None,
            }
        offsets = []
        for token, entry in pairs:
            offsets.append(offset)
            offset += len(entry[token].decoded_token or "")
        return {
            "tokens": [entry[token].decoded_token for token, entry in pairs],
            "token_logprobs": [_value(entry[token]) for token, entry in pairs],
            "top_logprobs": [{e.decoded_token: _value(e) for e in entry.values()} for _, entry in pairs],
            "text_offset": offsets,
        }


class Stream:
    """The events of an answer's choices, as their completions grow."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._lengths: dict[int, int] = {}
        """Characters so far of each choice that has begun."""
        self._parsers: dict[int, ToolParser] = {}
        self._calls: dict[int, int] = {}
        """Calls so far of each choice that has any."""

    def events(self, index: int, completion: CompletionOutput) -> Iterator[str]:
        """What a choice's next tokens and text are told as; often nothing."""
        answer, text, reason = self._answer, completion.text, completion.finish_reason
        if index not in self._lengths and answer.is_chat:
            yield answer.opening(index)
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        # A token may be no text yet: half a character, or the beginning of a stop string.
        some = bool(completion.logprobs or reason)
        if not answer.is_chat:
            if text or some:
                yield answer.chunk(index, completion, offset)
            return
        delta: dict[str, Any] = {}
        if answer.tools is not None:
            parser = self._parsers.setdefault(index, answer.tools.parser())
            text, calls = parser.feed(text, last=reason is not None)
            first = self._calls.get(index, 0)
            if calls:
                self._calls[index] = first + len(calls)
                numbered = enumerate(calls, first)
                delta["tool_calls"] = [
                    {"index": n} | answer.tool_call(index, n, call) for n, call in numbered
                ]
            if reason == "stop" and index in self._calls:
                reason = "tool_calls"
        if text or completion.logprobs:
            delta["content"] = text
        if delta or some:
            yield answer.delta(index, completion, delta, reason)


def usage(outputs: Iterable[RequestOutput]) -> dict[str, Any]:
    """Tokens of prompts and completions."""
    outputs = list(outputs)
    completion = sum(len(c.token_ids) for o in outputs for c in o.outputs)
    return count_usage(
        sum(len(o.prompt_token_ids) for o in outputs),
        sum(o.num_cached_tokens for o in outputs),
        completion,
    )


def count_usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _token(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": _value(entry), "bytes": list(text.encode())}


def _value(entry: Logprob) -> float:
    return max(entry.logprob, LOWEST)
