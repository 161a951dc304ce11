"""The requests of OpenAI's API, and a few sampling parameters that it lacks.

A field that would change the answer and isn't supported is refused, not ignored.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

from jaxdet.sampling_params import MAX_LOGPROBS, SamplingParams

MAX_N = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_BIASES = 1024
MAX_TOOLS = 128

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Prompts = Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
Count = Annotated[int, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenKey = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
FunctionName = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Object = dict[str, JsonValue]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchema(Strict):
    name: str
    description: str | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> Object | None:
        """The JSON schema that the answer must follow; None for text.

        Raises:
            ValueError: type is "json_schema" and there is none.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ValueError('response_format of type "json_schema" needs json_schema.schema; give one')
        return self.json_schema.schema_


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted; no chunk is ever padded."""


class Sampling(Strict):
    """What completions and chat completions share."""

    model: str
    temperature: float | None = Field(1.0, ge=0)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: dict[TokenKey, Bias] | None = Field(None, max_length=MAX_BIASES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOPS)

    # These say nothing about the answer.
    user: str | None = None
    metadata: Object | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, skip_special_tokens: bool = True
    ) -> SamplingParams:
        """The engine's parameters; null means OpenAI's default.

        Raises:
            ValueError: a value is out of range.
        """
        return SamplingParams(
            n=1 if self.n is None else self.n,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=self.stop or (),
            logit_bias=self.logit_bias or {},  # pyright: ignore[reportArgumentType]
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_token_ids=self.stop_token_ids or (),
            max_tokens=max_tokens,
            logprobs=logprobs,
            skip_special_tokens=skip_special_tokens,
        )


class CompletionRequest(Sampling):
    prompt: Prompts
    max_tokens: Count | None = None
    """16 without one, as OpenAI has it."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    # Nothing else is supported.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None

    # In answers that clients send back, always empty here.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: content is text, arguments of tool calls are objects."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": content or ""}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump() | {"function": {"name": f.name, "arguments": _arguments(f.arguments)}}
                for call in self.tool_calls
                for f in (call.function,)
            ]
        return message


class Function(Strict):
    name: FunctionName
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None

    def arguments_schema(self) -> Object:
        """What its arguments must be; without parameters, an empty object.

        Raises:
            ValueError: parameters describe no object.
        """
        if self.parameters is None:
            return {"type": "object", "additionalProperties": False}
        if self.parameters.get("type", "object") != "object":
            raise ValueError(f'tools: the parameters of {self.name!r} must have the type "object"; wrap them')
        return {**self.parameters, "type": "object"}


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionRef(Strict):
    name: str


class ToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionRef


class ChatCompletionRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether an answer may hold more than one call; null means yes."""
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    def functions(self) -> dict[str, Function]:
        """What the model may call.

        Raises:
            ValueError: two of them have one name, or tool_choice wants one that isn't there.
        """
        offered = (
            {} if self.tool_choice == "none" else {t.function.name: t.function for t in self.tools or ()}
        )
        if offered and len(offered) < len(self.tools or ()):
            raise ValueError("tools: two functions have the same name; rename one")
        if self.tool_choice == "required" and not offered:
            raise ValueError('tool_choice "required" needs tools; give some')
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in offered:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name!r} isn't among the tools; add it")
        return offered

    def forced(self) -> dict[str, Function]:
        """Those of `functions` of which it must call at least one."""
        offered = self.functions()
        if isinstance(self.tool_choice, ToolChoice):
            return {self.tool_choice.function.name: offered[self.tool_choice.function.name]}
        return offered if self.tool_choice == "required" else {}

    def template_arguments(self) -> dict[str, Any]:
        """What the chat template gets."""
        found: dict[str, Any] = {"messages": [message.for_template() for message in self.messages]}
        if self.functions():
            found["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return found


class ScoreRequest(Strict):
    model: str
    input: Prompts


class TokenizeRequest(Strict):
    """Either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[TokenId]


def _arguments(text: str) -> Any:
    """A tool call's arguments: OpenAI has them as JSON in a string, templates want the object."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
