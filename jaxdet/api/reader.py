"""From the body of a request to what the engine is asked."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdet.api.errors import ApiError
from jaxdet.api.protocol import ChatCompletionRequest, CompletionRequest, Prompts, Sampling
from jaxdet.api.tools import ToolUse, form_of
from jaxdet.api.tools import grammar as grammar_of
from jaxdet.engine.sequence import Constraint
from jaxdet.sampling_params import SamplingParams
from jaxdet.tokenizer import Tokenizer


class Grammar(NamedTuple):
    """What answers must follow; whoever compiles it may find that it can't be followed."""

    text: str
    """As llguidance writes it."""
    what: str
    """The argument it was made from."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What one body asks of the engine."""

    kind: str
    """"text_completion" or "chat.completion"."""
    prompts: Sequence[dict[str, Any]]
    """Each {"prompt_token_ids": ids}, with its text as "prompt" if it came as text."""
    params: SamplingParams
    logprobs: int | None
    """How many of the most likely tokens to list."""
    grammar: Grammar | None
    """What answers must follow."""
    tools: ToolUse | None = None
    """The tool calls that its answers may hold."""


class Reader:
    """Checks bodies and prepares them for one model; may be used in any thread.

    Args:
        tokenizer: the model's.
        vocab_size: the model's number of logits.
        name: what requests must call the model.
        max_tokens: the most tokens that one completion may have; None: what max_model_len leaves.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, name: str, *, max_tokens: int | None = None):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._name, self._most = name, max_tokens

    @functools.cached_property
    def _grammars(self):
        from jaxdet.grammar import JsonGrammars  # llguidance comes with the extra `serve`

        return JsonGrammars(self._tokenizer, self._vocab_size)

    def constraint(self, task: Task) -> Constraint | None:
        """What the engine takes for a task's grammar.

        Raises:
            ValueError: it can't be followed.
        """
        return None if task.grammar is None else self._grammars.start(*task.grammar)

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
        tools = self._tools(body)
        params = body.sampling_params(
            max_tokens=self._max_tokens(most, None),
            logprobs=wanted,
            skip_special_tokens=tools is None or not tools.form.is_special(self._tokenizer),
        )
        prompt = self._tokenizer.chat_prompt(**body.template_arguments(), **template)
        task = self._task("chat.completion", body, [prompt], params, wanted)
        if tools is not None and (forced := body.forced()):
            several = body.parallel_tool_calls is not False
            schemas = {name: function.arguments_schema() for name, function in forced.items()}
            rules = grammar_of(tools.form, schemas, self._tokenizer, several=several)
            task = dataclasses.replace(task, grammar=Grammar(rules, "tools"))
        return dataclasses.replace(task, tools=tools)

    def _tools(self, body: ChatCompletionRequest) -> ToolUse | None:
        """What answers are searched for; None: the body offers no tools, or the model's form of calls is unknown."""
        offered, forced = body.functions(), body.forced()
        if not offered:
            return None
        template = self._tokenizer.template_for(offered) or ""
        if "tools" not in template:
            raise ApiError(400, "tools: this model's chat template takes none; leave them out", param="tools")
        form = form_of(template)
        if form is None and forced:
            raise ApiError(
                400,
                "tool_choice: how this model writes calls isn't known; use 'auto' or 'none'",
                param="tool_choice",
            )
        if body.parallel_tool_calls is False and not forced:
            raise ApiError(
                400,
                "parallel_tool_calls=false needs tool_choice 'required' or a function; set it",
                param="parallel_tool_calls",
            )
        if body.response_format is not None and body.response_format.type != "text":
            raise ApiError(
                400,
                "response_format would rule out calls of tools; leave one out or set tool_choice to 'none'",
                param="response_format",
            )
        return form and ToolUse(form, frozenset(offered))

    def encode(self, prompts: Prompts) -> list[dict[str, Any]]:
        """Prompts of the protocol as prompts of the engine."""
        listed: Any = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
        encode = self._tokenizer.encode
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
        grammar = None
        if schema is not None:
            from jaxdet.grammar import JsonGrammars

            grammar = Grammar(JsonGrammars.of_schema(schema), "json_schema")
        return Task(kind, prompts, params, logprobs, grammar)

    def _max_tokens(self, asked: int | None, default: int | None) -> int | None:
        most = self._most
        if asked is not None and most is not None and asked > most:
            raise ApiError(
                400, f"max_tokens={asked} must be at most {most} here; ask for fewer", param="max_tokens"
            )
        if asked is not None:
            return asked
        return min((limit for limit in (default, most) if limit is not None), default=None)
