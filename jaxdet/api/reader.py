"""From the body of a request to what the engine is asked."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxdet.api.errors import ApiError
from jaxdet.api.protocol import ChatCompletionRequest, CompletionRequest, Prompts, Sampling
from jaxdet.engine.sequence import Constraint
from jaxdet.llm import LLM, Prompt, Request
from jaxdet.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Task:
    """What one body asks of the engine."""

    kind: str
    """"text_completion" or "chat.completion"."""
    prompts: Sequence[Prompt]
    params: SamplingParams
    logprobs: int | None
    """How many of the most likely tokens to list."""
    constraint: Constraint | None

    @property
    def submit(self) -> list[Callable[[LLM], Request]]:
        """Each hands one of the prompts to an engine."""
        return [
            functools.partial(
                LLM.submit, prompt=prompt, sampling_params=self.params, constraint=self.constraint
            )
            for prompt in self.prompts
        ]

    @property
    def size(self) -> int:
        """Sequences that it runs."""
        return len(self.prompts) * self.params.n


class Reader:
    """Checks bodies and prepares them for one LLM; may be used in any thread.

    Args:
        name: what requests must call the model.
        max_tokens: the most tokens that one completion may have; None: what max_model_len leaves.
    """

    def __init__(self, llm: LLM, name: str, *, max_tokens: int | None = None):
        self._llm, self._name, self._most = llm, name, max_tokens

    @functools.cached_property
    def _grammars(self):
        from jaxdet.grammar import JsonGrammars  # llguidance comes with the extra `serve`

        return JsonGrammars(self._llm.tokenizer, self._llm.engine.step_fn.config.vocab_size)

    def completion(self, body: CompletionRequest) -> Task:
        """Raises ApiError or ValueError if the body asks for what can't be."""
        self.check_model(body.model)
        params = body.sampling_params(
            max_tokens=self._max_tokens(body.max_tokens, 16), logprobs=body.logprobs
        )
        return self._task("text_completion", body, self.encode(body.prompt), params, body.logprobs)

    def chat(self, body: ChatCompletionRequest, **template: Any) -> Task:
        """As `completion`; `template` goes to the chat template."""
        self.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs; set it to true", param="top_logprobs")
        wanted = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        params = body.sampling_params(max_tokens=self._max_tokens(most, None), logprobs=wanted)
        prompt = self._llm.chat_prompt(**body.template_arguments(), **template)
        return self._task("chat.completion", body, [prompt], params, wanted)

    def encode(self, prompts: Prompts) -> list[dict[str, Any]]:
        """Prompts of the protocol as prompts of the engine."""
        listed: Any = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
        encode = self._llm.tokenizer.encode
        return [
            {"prompt": p, "prompt_token_ids": encode(p)} if isinstance(p, str) else {"prompt_token_ids": p}
            for p in listed
        ]

    def check_model(self, name: str) -> None:
        """Raises ApiError if that isn't this model's name."""
        if name != self._name:
            raise ApiError(
                404,
                f"model {name!r} isn't served here; use {self._name!r}",
                param="model",
                code="model_not_found",
            )

    def _task(
        self, kind: str, body: Sampling, prompts: list[Any], params: SamplingParams, logprobs: int | None
    ) -> Task:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream; set it to true", param="stream_options")
        schema = None if body.response_format is None else body.response_format.schema_of_answer()
        constraint = None if schema is None else self._grammars.compile(schema)
        return Task(kind, prompts, params, logprobs, constraint)

    def _max_tokens(self, asked: int | None, default: int | None) -> int | None:
        most = self._most
        if asked is not None and most is not None and asked > most:
            raise ApiError(
                400, f"max_tokens={asked} must be at most {most} here; ask for fewer", param="max_tokens"
            )
        if asked is not None:
            return asked
        return min((limit for limit in (default, most) if limit is not None), default=None)
