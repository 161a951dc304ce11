"""Text to token ids and back, over the `tokenizers` library; chat templates run in jinja's sandbox."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Args:
        backend: the `tokenizers` tokenizer.
        bos_token, eos_token: special tokens, as text.
        eos_token_ids: every id that ends an answer.
        chat_template: jinja source, or None.
        tool_template: the one for conversations with tools, if there is another ("tool_use").
        add_bos: put the bos token first when the tokenizer itself does not.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        eos_token_ids: Sequence[int],
        chat_template: str | None,
        tool_template: str | None = None,
        add_bos: bool = False,
    ):
        self.backend = backend
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id = backend.token_to_id(bos_token) if bos_token else None
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template, self.tool_template = chat_template, tool_template
        self.add_bos = add_bos and self.bos_token_id is not None

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads tokenizer.json and what stands beside it.

        Raises:
            ValueError: there is no tokenizer.json, or a file or one of its fields (named) is damaged.
        """
        path = folder / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ValueError(
                f"{path} is missing or damaged ({_first_line(error)}); fetch the model again"
            ) from None
        backend.no_truncation()  # how training cut and padded its texts is no part of a prompt
        backend.no_padding()
        config, generation, model = (
            read_json(folder / name)
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        template, tool_template = (_template(config, name) for name in ("default", "tool_use"))
        if (jinja := folder / "chat_template.jinja").exists():
            try:
                template = jinja.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{jinja} is no UTF-8 text; fetch the model again") from None
        bos, eos = (_special(config, key) for key in ("bos_token", "eos_token"))
        ids = (
            _end_ids(generation, "generation_config.json")
            if "eos_token_id" in generation
            else _end_ids(model, "config.json")
        )
        ids |= {backend.token_to_id(eos)} if eos else set()
        return cls(
            backend,
            bos_token=bos,
            eos_token=eos,
            eos_token_ids=sorted(i for i in ids if i is not None),
            chat_template=template,
            tool_template=tool_template,
            add_bos=bool(config.get("add_bos_token")),
        )

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Raises:
            ValueError: `text` holds lone surrogates, as arguments and file names that are no UTF-8 do.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("prompt holds bytes that are no UTF-8; give it as UTF-8 text") from None
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self.add_bos and ids[:1] != [self.bos_token_id]:
            ids = [self.bos_token_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def template_for(self, tools: object) -> str | None:
        """The chat template of a conversation with these tools, if any."""
        return (self.tool_template if tools else None) or self.chat_template

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the text that the model was trained on.

        Raises:
            ValueError: the model has no chat template, or the template refuses the messages.
        """
        template = self.template_for(tools)
        if not template:
            raise ValueError(
                "messages need a chat template and this model has none; use generate with a prompt"
            )
        try:
            return _compiled(template).render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
                **variables,
            )
        except Exception as error:  # a template can divide by zero, too
            raise ValueError(f"messages do not fit the chat template: {_first_line(error)}") from None

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> dict[str, Any]:
        """The conversation as a prompt: {"prompt": text, "prompt_token_ids": ids}.

        Args:
            messages: [{"role": "user", "content": "…"}, …].
            template: as for `apply_chat_template`.

        Raises:
            ValueError: a message has no role, or as for `apply_chat_template`.
        """
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f'messages holds {message!r}; use {{"role": "user", "content": "…"}}')
        text = self.apply_chat_template(messages, **template)
        return {"prompt": text, "prompt_token_ids": self.encode(text, add_special_tokens=False)}

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json for `from_folder`."""
        self.backend.save(str(folder / "tokenizer.json"))
        templates = {"default": self.chat_template, "tool_use": self.tool_template}
        named = [{"name": name, "template": text} for name, text in templates.items() if text]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # or transformers builds one of the model's family
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "add_bos_token": self.add_bos,
            "chat_template": named if self.tool_template else self.chat_template,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))
        generation = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids)}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which would print nothing for an attribute it withholds; here the template fails."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is out of bounds")


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiling takes milliseconds, about as long as a small model's step."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class DecodeStream:
    """Decodes a growing list of tokens; text comes out once it is whole characters."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._backend = tokenizer.backend
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        return self._stream.step(self._backend, token) or ""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object; fetch the model again")
    return value


def _special(config: Mapping[str, Any], key: str) -> str | None:
    """A special token, written as text or as {"content": text}."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) and token is not None:
        raise ValueError(f"tokenizer_config.json: {key}={token!r} must be a string; fetch the model again")
    return text


def _template(config: Mapping[str, Any], name: str) -> str | None:
    """The chat template of that name; one without a name is the default one."""
    given = config.get("chat_template")
    template = given if name == "default" else None
    if isinstance(given, list) and all(isinstance(t, dict) for t in given):
        template = next((t.get("template") for t in given if t.get("name") == name), None)
    if not isinstance(template, str | None):
        raise ValueError(
            f"tokenizer_config.json: chat_template={given!r} must be a string or a list of named templates; "
            "fetch the model again"
        )
    return template


def _end_ids(config: Mapping[str, Any], file: str) -> set[int]:
    """`eos_token_id`: none, one or several."""
    given = config.get("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(
            f"{file}: eos_token_id={given!r} must be a token id or a list of them; fetch the model again"
        )
    return set(ids)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
