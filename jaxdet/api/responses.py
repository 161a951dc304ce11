"""The answers of OpenAI's API: whole ones as dictionaries, chunks of a stream as events."""

import dataclasses
import functools
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

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
    id: str = dataclasses.field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

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
        if not self.is_chat:
            return self._event(self._choice(index, completion, offset))
        delta = {"content": completion.text} if completion.text or completion.logprobs else {}
        return self._event(
            {
                "index": index,
                "delta": delta,
                "logprobs": self._logprobs(completion, offset),
                "finish_reason": completion.finish_reason,
            }
        )

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

    def _choice(self, index: int, completion: CompletionOutput, offset: int = 0) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self.is_chat:
            choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
        else:
            choice["text"] = completion.text
        return choice | {
            "logprobs": self._logprobs(completion, offset),
            "finish_reason": completion.finish_reason,
        }

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
