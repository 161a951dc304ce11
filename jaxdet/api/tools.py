"""Tool calls: in which form a model writes them, how they are read, and the grammar that makes it write one."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxdet.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ToolForm:
    """How a family of models writes calls.

    Args:
        begin: what announces them.
        end: what follows them; it may be missing at the end of an answer.
        listed: they stand in one JSON list, not each on its own.
        bare: an answer that begins with a JSON object needs no `begin`.
        gap: white space between the marks and the JSON.
        arguments: the key of a call's arguments.
    """

    begin: str
    end: str = ""
    listed: bool = False
    bare: bool = False
    gap: str = ""
    arguments: str = "arguments"

    def is_special(self, tokenizer: Tokenizer) -> bool:
        """Whether `begin` is a token that decoding leaves out unless it is told not to."""
        added = tokenizer.backend.get_added_tokens_decoder()
        return any(token.special and token.content == self.begin for token in added.values())


HERMES = ToolForm("<tool_call>", "</tool_call>", gap="\n")
"""Hermes, Qwen2.5, Qwen3."""
SMOLLM = ToolForm("<tool_call>", "</tool_call>", listed=True)
MISTRAL = ToolForm("[TOOL_CALLS]", listed=True)
LLAMA = ToolForm("<|python_tag|>", bare=True, arguments="parameters")
LLAMA_ASKS = '{"name": function name, "parameters": dictionary of argument name and its value}'
"""From Llama 3's templates, of which some don't have the tag."""


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template teaches; None if it teaches none of these."""
    if "[TOOL_CALLS]" in template:
        return None if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        # Qwen3-Coder and GLM put XML between these marks.
        if "<function=" in template or "<arg_key>" in template:
            return None
        return SMOLLM if "<tool_call>[" in template else HERMES
    return LLAMA if "<|python_tag|>" in template or LLAMA_ASKS in template else None


def grammar(
    form: ToolForm, tools: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, several: bool
) -> str:
    """llguidance's grammar of an answer that is nothing but calls.

    Args:
        tools: JSON schemas of the arguments, by function.
        several: whether there may be more than one; Llama's form has no way to write that.
    """
    bodies = []
    for name, schema in tools.items():
        head = json.dumps({"name": name, form.arguments: 0}).removesuffix("0}")
        # As models are trained to write it: with these blanks and no others.
        spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        bodies.append(f'{json.dumps(head)} %json {json.dumps({**schema, "x-guidance": spaced})} "}}"')
    rules = [f"call_{i}: {body}" for i, body in enumerate(bodies)]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(bodies))))
    begin, end = (_mark(mark, tokenizer) for mark in (form.begin, form.end))
    if form.listed:
        more = '(", " call)*' if several else ""
        # Mistral's tokenizers differ in the blank after the mark.
        rules.append(f'start: {begin} " "? "[" call {more} "]" {end}')
    elif form.bare:
        rules.append("start: call")
    else:
        gap = json.dumps(form.gap)
        rules.append(f"marked: {begin} {gap} call {gap} {end}")
        rules.append("start: marked" + (f" ({gap} marked)*" if several else ""))
    return "%llguidance {}\n" + "\n".join(rules)


def _mark(text: str, tokenizer: Tokenizer) -> str:
    """A mark in a grammar: the token if it is one, whose text llguidance wouldn't take for it."""
    token = tokenizer.backend.token_to_id(text)
    return f"<[{token}]>" if token is not None else json.dumps(text) if text else ""


class Call(NamedTuple):
    name: str
    arguments: str
    """A JSON object."""


class Piece(NamedTuple):
    """What some text of an answer turned out to be."""

    content: str
    calls: list[Call]


class ToolParser:
    """Finds the calls in an answer that comes in parts; what it finds doesn't depend on where they were cut.

    What looks like a call is held back until it is known to be one. What isn't (no JSON, a function that wasn't
    offered, arguments that are no object) is content, to the last blank; white space beside calls is dropped.

    Args:
        names: the functions that were offered.
    """

    def __init__(self, form: ToolForm, names: Collection[str]):
        self._form, self._names = form, names
        self._rest = ""
        """Text that isn't settled."""
        self._blank = ""
        """White space that is content if more content follows."""
        self._json: _JsonEnd | None = None
        """Where the JSON ends, if the rest may be a call."""
        self._mark = 0
        """Length of the mark before it."""
        self._bare = form.bare
        """Whether a call may begin without a mark here."""
        self._any = False
        self._content: list[str] = []
        self._calls: list[Call] = []

    def feed(self, text: str, *, last: bool = False) -> Piece:
        """What became clear with the next part of the text; `last` says that it was the last one."""
        self._rest += text
        while self._call(last) if self._json is not None else self._begin(last):
            pass
        if last and not self._any:
            self._content.append(self._blank)
        piece = Piece("".join(self._content), self._calls)
        self._content, self._calls = [], []
        return piece

    def _begin(self, last: bool) -> bool:
        """Looks for the beginning of a call; whether there is one."""
        rest, begin = self._rest, self._form.begin
        marks = [(at, len(begin))] if (at := rest.find(begin)) >= 0 else []
        start = len(rest) - len(rest.lstrip())
        if self._bare and rest[start : start + 1] in ("{", ";" if self._any else "{"):
            marks.append((start, int(rest[start] == ";")))
        if marks:
            at, self._mark = min(marks)
            self._json = _JsonEnd(self._mark)
        else:
            # The end may be half a mark.
            at = len(rest) - (0 if last else _overlap(rest, begin))
        self._settle(rest[:at])
        self._rest = rest[at:]
        return bool(marks)

    def _call(self, last: bool) -> bool:
        """Tries to read a call from the rest; whether it is settled what it begins with."""
        assert self._json is not None
        rest, end = self._rest, self._form.end
        stop = self._json.find(rest)
        found: list[Call] | None = None
        if stop is None:
            if not last and not self._json.failed:
                return False
        else:
            after = rest[stop:].lstrip()
            cut = end.startswith(after)
            if not last and cut and after != end:
                return False
            if cut or after.startswith(end):
                found = self._read(rest[self._mark : stop])
                stop = len(rest) - len(after) + len(end) if end else stop
        if found is None:
            stop = self._json.seen if stop is None else stop
            self._settle(rest[:stop])
        else:
            self._calls += found
            self._any, self._blank, self._bare = True, "", self._form.bare
        self._json, self._rest = None, rest[stop:]
        return True

    def _settle(self, text: str) -> None:
        """Takes text for content."""
        if text.strip():
            self._bare = False
            kept = text.rstrip()
            self._content.append(self._blank + kept)
            self._blank = text[len(kept) :]
        else:
            self._blank += text

    def _read(self, text: str) -> list[Call] | None:
        """The calls in a JSON text; None if it is anything else."""
        try:
            value = json.loads(text)
            return [self._one(call) for call in (value if isinstance(value, list) else [value])] or None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _one(self, call: Any) -> Call:
        name = call["name"]
        arguments = call["arguments"] if "arguments" in call else call.get("parameters", {})
        if name not in self._names or not isinstance(arguments, dict):
            raise ValueError
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()  # lone surrogates could not be sent
        return Call(name, text)


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """What an answer is searched for."""

    form: ToolForm
    names: frozenset[str]

    def parser(self) -> ToolParser:
        return ToolParser(self.form, self.names)


class _JsonEnd:
    """Finds the end of the JSON list or object after some white space, in a text that grows."""

    def __init__(self, start: int):
        self.seen = start
        """How far the text was looked at."""
        self.failed = False
        """It is no list or object; `seen` is where that shows."""
        self._depth, self._quoted = 0, False
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """Where it ends, once that is known."""
        while self._end is None and not self.failed and self.seen < len(text):
            c = text[self.seen]
            if not self._depth and c not in "{[" and not c.isspace():
                self.failed = True
                break
            # An escaped character may be in the next part.
            self.seen += 2 if self._quoted and c == "\\" else 1
            if c == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += (c in "{[") - (c in "}]")
                if c in "}]" and not self._depth:
                    self._end = self.seen
        return self._end


def _overlap(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)
