"""Tool calls: read from any text in any pieces, forced by a grammar, and through OpenAI's own client."""

import dataclasses
import json
import random

import numpy as np
import openai
import pytest
from serving import serving

from jaxdet.api import reader
from jaxdet.api.tools import HERMES, LLAMA, MISTRAL, SMOLLM, Call, ToolParser, form_of, grammar
from jaxdet.grammar import JsonGrammars
from jaxdet.llm import LLM
from jaxdet.testing import byte_tokenizer, write_tiny_model

ONE = '{"name": "f", "arguments": {"x": 1}}'
TWO = '{"name": "g", "arguments": {"s": "</tool_call> }] \\" é"}}'
F, G = Call("f", '{"x": 1}'), Call("g", '{"s": "</tool_call> }] \\" é"}')
CASES = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [F]),
    (HERMES, f"I see.\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{TWO}\n</tool_call>\n", "I see.", [F, G]),
    (HERMES, f"a <tool_call>{ONE}</tool_call> b ", "a b", [F]),
    (HERMES, f"<tool_call>\n{ONE}\n", "", [F]),
    (HERMES, f"<tool_call>\n{ONE}\n</tool", "", [F]),
    (SMOLLM, f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", [F, G]),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [F, G]),
    (MISTRAL, f"Well. [TOOL_CALLS][{ONE}]", "Well.", [F]),
    (LLAMA, '{"name": "f", "parameters": {"x": 1}}', "", [F]),
    (LLAMA, ' <|python_tag|>{"name": "f", "parameters": {"x": 1}}', "", [F]),
    (LLAMA, f'{{"name": "f", "parameters": {{"x": 1}}}}; {TWO}', "", [F, G]),
    (LLAMA, f"Let me see. <|python_tag|>{ONE}", "Let me see.", [F]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [Call("f", "{}")]),
]
MALFORMED = [
    (HERMES, ""),
    (HERMES, "  two < three, <tool_ and <tool_calls> \n"),
    (HERMES, "<tool_call>"),
    (HERMES, "<tool_call>\n{oops}\n</tool_call> so "),
    (HERMES, f"<tool_call>\n{ONE[:-1]}\n</tool_call>"),
    (HERMES, f"<tool_call>\n{ONE} and {TWO}\n</tool_call>"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"x": %s}}</tool_call>' % ("9" * 5000)),
    (HERMES, "<tool_call>" + "[" * 3000 + "]" * 3000),
    (HERMES, "<tool_call>[]</tool_call>"),
    (HERMES, "<tool_call>[1]</tool_call>"),
    (HERMES, "<tool_call>5</tool_call>"),
    (HERMES, ONE),
    (MISTRAL, f"[TOOL_CALLS] [{ONE}, 5]"),
    (MISTRAL, "[TOOL_CALLS] brave"),
    (LLAMA, '{"answer": 42}'),
    (LLAMA, f"So: {ONE}"),
    (LLAMA, "<|python_tag|>brave_search.call(query='x')"),
]


def read(form, parts: list[str]) -> tuple[str, list[Call]]:
    parser = ToolParser(form, {"f", "g"})
    pieces = [parser.feed(part) for part in parts] + [parser.feed("", last=True)]
    return "".join(p.content for p in pieces), [call for p in pieces for call in p.calls]


def cuts(text: str):
    """The text in one piece, letter by letter, and cut at random."""
    rng = random.Random(0)
    yield [text]
    yield list(text)
    for _ in range(20):
        at = sorted(rng.sample(range(len(text) + 1), min(4, len(text))))
        yield [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(form, text, content, calls):
    for parts in cuts(text):
        assert read(form, parts) == (content, calls), parts


@pytest.mark.parametrize(("form", "text"), MALFORMED, ids=lambda value: str(value)[:40])
def test_what_is_no_call_stays_content(form, text):
    for parts in cuts(text):
        assert read(form, parts) == (text, []), parts


def test_a_call_after_something_malformed_is_found():
    text = f"<tool_call>{{}}</tool_call>\n<tool_call>{ONE}</tool_call>"
    assert read(HERMES, [text]) == ("<tool_call>{}</tool_call>", [F])


def test_long_answers_take_no_time():
    """Nothing is looked at twice: 30,000 characters letter by letter, each of which might begin or end something."""
    for text in ("<tool_call>" + "[<tool_call>" * 2500, "<tool_call>" + "{}" * 15_000, "{" * 30_000):
        assert read(HERMES, list(text)) == (text, [])


def test_forms_are_known_by_their_templates():
    assert form_of("<tool_call>\n{'name': <function-name>}\n</tool_call>") is HERMES
    assert form_of("<tool_call>[{...}]</tool_call>") is SMOLLM
    assert form_of("{{ ' [TOOL_CALLS] [' }}") is MISTRAL
    assert form_of(f"Respond in the format {ASKS}.") is LLAMA
    assert form_of("{{ '<|python_tag|>' }}") is LLAMA
    for other in (
        "{{ m.content }}",
        "<tool_call>\n<function=f>",
        "[TOOL_CALLS]f[ARGS]{}",
        "<tool_call>f<arg_key>",
        '"parameters": {{ tool.parameters }}',
    ):
        assert form_of(other) is None


SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {"x": {"$ref": "#/$defs/digit"}},
        "required": ["x"],
        "additionalProperties": False,
        "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
    "f2": {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    | {"additionalProperties": False},
}


@pytest.mark.parametrize("form", [HERMES, SMOLLM, MISTRAL, LLAMA])
@pytest.mark.parametrize("token", [False, True], ids=["letters", "token"])
def test_grammars_allow_calls_and_nothing_else(form, token):
    """Walks at random through what the grammar allows: all that comes out is read as calls that fit their schemas."""
    tokenizer = byte_tokenizer()
    if token:
        tokenizer.backend.add_special_tokens([mark for mark in (form.begin, form.end) if mark])
    vocab = tokenizer.vocab_size
    start = JsonGrammars(tokenizer, vocab).start(grammar(form, SCHEMAS, tokenizer, several=True), "tools")
    rng, names, counts = random.Random(1), set(), set()
    for _ in range(30):
        state, ids = start.copy(), []
        while len(ids) < 2000:
            bits = np.unpackbits(state.allowed([]).view(np.uint8), bitorder="little")[:vocab]
            allowed = np.flatnonzero(bits).tolist()
            choice = rng.choice(allowed)
            if choice in tokenizer.eos_token_ids:
                break
            ids.append(choice)
            state.append(choice)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        parser = ToolParser(form, SCHEMAS)
        content, calls = parser.feed(text, last=True)
        assert calls and not content, text
        counts.add(len(calls))
        for name, arguments in calls:
            value = json.loads(arguments)
            names.add(name)
            assert value["x"] in range(10) if name == "f" else isinstance(value["ok"], bool)
    assert names == {"f", "f2"} and (form is LLAMA or len(counts) > 1)


ASKS = '{"name": function name, "parameters": dictionary of argument name and its value}'
TEMPLATES = {
    "hermes": "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{{ tools | tojson }}",
    "llama": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}" + ASKS + "{{ tools }}",
    "mistral": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}[TOOL_CALLS] [{{ tools }}",
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in SCHEMAS.items()
]
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "tools": TOOLS, "max_tokens": 200}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A model whose token <|im_start|> is called [TOOL_CALLS], as Mistral's is."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    tokens = folder / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace("<|im_start|>", "[TOOL_CALLS]"))
    with serving(LLM(folder, max_num_seqs=1, max_num_batched_tokens=64, max_model_len=2048)) as server:
        yield server


@pytest.fixture(params=TEMPLATES)
def family(request, server, monkeypatch):
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", TEMPLATES[request.param])
    return request.param


def joined(stream) -> tuple[str, list, str | None]:
    """A stream's content, calls and finish reason."""
    content, calls, reason = "", {}, None
    for chunk in stream:
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or ():
            name, arguments = calls.get(part.index, ("", ""))
            calls[part.index] = (
                name + (part.function.name or ""),
                arguments + (part.function.arguments or ""),
            )
    assert list(calls) == list(range(len(calls)))
    return content, list(calls.values()), reason


def whole(answer) -> tuple[str, list, str | None]:
    (choice,) = answer.choices
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]
    assert all(len(c.id) == 9 and c.type == "function" for c in choice.message.tool_calls or ())
    return choice.message.content or "", calls, choice.finish_reason


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f2"}}], ids=str)
def test_calls_can_be_required(server, family, choice):
    ask = server.client.chat.completions.create
    asked = ASK | {"tool_choice": choice, "parallel_tool_calls": False, "temperature": 0.9, "seed": 4}
    answer = whole(ask(**asked))
    content, ((name, arguments),), reason = answer
    assert not content and reason == "tool_calls" and name in SCHEMAS
    assert choice == "required" or name == "f2"
    assert sorted(json.loads(arguments)) == sorted(SCHEMAS[name]["required"])
    assert joined(ask(**asked, stream=True)) == answer
    with server.client.chat.completions.stream(**asked) as stream:
        assert whole(stream.get_final_completion()) == answer
    # Log-probabilities stay those of all tokens, whatever the text was taken for.
    found = ask(**asked, logprobs=True)
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens


WRITTEN = {
    "hermes": f"I see.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>",
    "llama": ONE.replace("arguments", "parameters"),
    "mistral": f"I see.[TOOL_CALLS] [{ONE}, {ONE}]",
}


@pytest.fixture
def writes(monkeypatch):
    """Makes the model write a given text, whatever it is asked."""
    read_chat = reader.Reader.chat

    def force(text: str) -> None:
        parts = [p if p == "[TOOL_CALLS]" else json.dumps(p) for p in text.partition("[TOOL_CALLS]") if p]
        rules = "start: " + " ".join("<[257]>" if p == "[TOOL_CALLS]" else p for p in parts)

        def chat(self, body):
            return dataclasses.replace(read_chat(self, body), grammar=reader.Grammar(rules, "text"))

        monkeypatch.setattr(reader.Reader, "chat", chat)

    return force


def test_calls_in_free_text(server, family, writes):
    writes(WRITTEN[family])
    ask = server.client.chat.completions.create
    answer = whole(ask(**ASK))
    assert answer[1:] == ([F] * (1 if family == "llama" else 2), "tool_calls")
    assert answer[0] == ("" if family == "llama" else "I see.")
    assert joined(ask(**ASK, stream=True)) == joined(ask(**ASK, stream=True, logprobs=True)) == answer
    # Nobody offered anything, so it is text; and what is cut off before its end is text as well.
    for change in ({"tools": openai.omit}, {"tool_choice": "none"}):
        content, calls, reason = whole(ask(**(ASK | change)))
        assert (content.replace("[TOOL_CALLS]", ""), calls, reason) == (
            WRITTEN[family].replace("[TOOL_CALLS]", ""),
            [],
            "stop",
        )
    content, calls, reason = whole(ask(**(ASK | {"max_tokens": 20})))
    assert (content, calls, reason) == (
        server.llm.tokenizer.decode(
            server.llm.tokenizer.encode(WRITTEN[family])[:20], skip_special_tokens=False
        ),
        [],
        "length",
    )


def test_a_conversation_with_calls(server, monkeypatch, writes):
    """The client's own objects go back as they came, with the tool's answer."""
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", TEMPLATES["hermes"])
    ask = server.client.chat.completions.create
    message = ask(**(ASK | {"tool_choice": "required"}), seed=1, n=2).choices[1].message
    ids = [call.id for call in message.tool_calls]
    assert len({*ids}) == len(ids)
    history = [*ASK["messages"], message, {"role": "tool", "tool_call_id": ids[0], "content": "42"}]
    writes("It is 42.")
    answer = ask(**(ASK | {"messages": history}))
    assert whole(answer) == ("It is 42.", [], "stop")
    assert answer.usage.prompt_tokens > ask(**ASK).usage.prompt_tokens


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tools": openai.omit, "tool_choice": "required"}, "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "'h' isn't among the tools"),
        ({"tools": TOOLS + TOOLS}, "same name"),
        ({"tools": TOOLS * 65}, "at most 128"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"parallel_tool_calls": False}, "needs tool_choice"),
        ({"response_format": {"type": "json_object"}}, "rule out calls"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}
            | {"tool_choice": "required"},
            'must have the type "object"',
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"x": {"type": "?"}}}},
                    }
                ]
            }
            | {"tool_choice": "required"},
            "tools can't be followed",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_called(server, monkeypatch, change, says):
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", TEMPLATES["hermes"])
    with pytest.raises(openai.BadRequestError, match=says):
        server.client.chat.completions.create(**(ASK | change))


def test_templates_that_know_no_tools(server, monkeypatch):
    ask = server.client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="chat template takes none"):
        ask(**ASK)
    monkeypatch.setattr(server.llm.tokenizer, "chat_template", "{{ tools }}")
    assert ask(**(ASK | {"max_tokens": 2})).choices[0].message.tool_calls is None
    with pytest.raises(openai.BadRequestError, match="isn't known"):
        ask(**ASK, tool_choice="required")
