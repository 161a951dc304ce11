"""Tokenizers from GGUF vocabularies, streaming decode, and chat templates in the sandbox."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from gguf_files import save
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxdet.checkpoints import open_checkpoint
from jaxdet.tokenizer import DecodeStream, Tokenizer

TEXTS = (
    "Hello, world!",
    "In 1984 it was 12345.6 degrees",
    "naïve café – Ωμέγα – Привет – 你好，世界 – שלום",
    "🙂👩‍👩‍👧‍👦🇺🇳 done",
    "  two  spaces\tand a tab\n\n  new lines \r\n",
    "\u0000\u200b\ufeff\U0010ffff",
    "def f(x):\n    return x + 1\n",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level_reference() -> tokenizers.Tokenizer:
    """SmolLM2's kind of tokenizer, trained on the texts."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    return backend


def through_gguf(path: Path, **metadata) -> Tokenizer:
    """Writes a model with this tokenizer and reads it back; keys are `GGUFWriter.add_…` methods."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((len(metadata["token_list"]), 8), np.float32))
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    save(writer)
    return open_checkpoint(path).tokenizer()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    reference = byte_level_reference()
    vocabulary = reference.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(reference.to_str())["model"]["merges"]
    found = through_gguf(
        tmp_path_factory.mktemp("vocabulary") / "model.gguf",
        tokenizer_model="gpt2",
        tokenizer_pre="smollm",
        token_list=tokens,
        token_types=[3 if t in SPECIAL else 1 for t in tokens],
        token_merges=[" ".join(m) for m in merges],
        bos_token_id=1,
        eos_token_id=2,
        add_bos_token=False,
    )
    return found, reference


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    """Llama 2's kind: a score per token, bytes for what has no token, a space in front."""
    pieces = [
        "▁",
        "e",
        "t",
        "h",
        "o",
        "l",
        "r",
        "d",
        "▁t",
        "he",
        "▁the",
        "ll",
        "lo",
        "llo",
        "he▁",
        "w",
        "or",
        "ld",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, "<turn>"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0]
    return through_gguf(
        tmp_path_factory.mktemp("vocabulary") / "model.gguf",
        tokenizer_model="llama",
        token_list=tokens,
        token_types=types,
        token_scores=scores,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_equals_the_tokenizer_it_came_from(byte_level, text: str):
    found, reference = byte_level
    assert found.encode(text) == reference.encode(text).ids
    assert found.decode(found.encode(text)) == text


def test_digits_stand_alone(byte_level):
    found, _ = byte_level
    assert len(found.encode("1984")) == 4
    assert [found.decode([i]) for i in found.encode("1984")] == list("1984")


def test_special_tokens(byte_level):
    found, _ = byte_level
    assert found.encode("<|im_start|>Hello<|im_end|>")[:: len(found.encode("Hello")) + 1] == [1, 2]
    assert found.decode([1, *found.encode("Hello"), 2]) == "Hello"
    assert found.decode([1, *found.encode("Hello")], skip_special_tokens=False) == "<|im_start|>Hello"
    assert (found.bos_token_id, found.eos_token_ids) == (1, (2,))


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_round_trip(sentencepiece: Tokenizer, text: str):
    ids = sentencepiece.encode(text)
    assert ids[0] == sentencepiece.bos_token_id == 1
    assert sentencepiece.decode(ids) == text


def test_sentencepiece_pieces(sentencepiece: Tokenizer):
    """Best score first; bytes for the rest; the user's own token whole."""

    def pieces(text):
        return [sentencepiece.backend.id_to_token(i) for i in sentencepiece.encode(text)[1:]]

    assert pieces("the world") == ["▁the", "▁", "w", "or", "ld"]
    assert pieces("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert "<turn>" in pieces("the<turn>the")
    assert sentencepiece.encode("", add_special_tokens=False) == []


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = DecodeStream(tokenizer)
    return "".join(stream.step(i) for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_text(byte_level, sentencepiece: Tokenizer, text: str):
    for tokenizer in (byte_level[0], sentencepiece):
        assert streamed(tokenizer, tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back(byte_level, sentencepiece: Tokenizer, text: str):
    for tokenizer in (byte_level[0], sentencepiece):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert streamed(tokenizer, ids) == text


def test_a_stream_never_shows_half_a_character(byte_level):
    found, _ = byte_level
    stream = DecodeStream(found)
    ids = found.backend.encode("𝄞").ids
    assert len(ids) == 4
    assert [stream.step(i) for i in ids] == ["", "", "", "𝄞"]


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer(models.BPE({"a": 0}, [])),
        bos_token=None,
        eos_token=None,
        eos_token_ids=(),
        chat_template=template,
    )


def saved(folder: Path, **files: dict) -> Path:
    """A folder with the tokenizer.json of one letter a token, and other files."""
    backend = tokenizers.Tokenizer(models.BPE({chr(97 + i): i for i in range(26)}, []))
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_truncation_and_padding_of_the_file_leave_prompts_alone(tmp_path: Path):
    folder = saved(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    assert len(backend.encode("abcd").ids) == 2  # negative control
    backend.enable_padding(length=8)
    assert len(backend.encode("abcd").ids) == 8
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("abcd") == [0, 1, 2, 3]
    tokenizer.save(folder)
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("abcd").ids == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config", "eos_token_id", "x"),
        ("generation_config", "eos_token_id", {"x": 1}),
        ("generation_config", "eos_token_id", [1, "x"]),
        ("generation_config", "eos_token_id", True),
        ("generation_config", "eos_token_id", -1),
        ("config", "eos_token_id", 1.5),
        ("tokenizer_config", "chat_template", [1]),
        ("tokenizer_config", "chat_template", 1),
        ("tokenizer_config", "chat_template", [{"name": "default", "template": 1}]),
        ("tokenizer_config", "bos_token", 5),
        ("tokenizer_config", "eos_token", {"x": 1}),
        ("tokenizer_config", "eos_token", ["a"]),
    ],
)
def test_fields_of_other_types_are_named(tmp_path: Path, file: str, field: str, value):
    with pytest.raises(ValueError, match=rf"^{file}\.json: {field}=.* must be ") as caught:
        Tokenizer.from_folder(saved(tmp_path, **{file: {field: value}}))
    assert "\n" not in str(caught.value)


def test_fields_as_they_are_written(tmp_path: Path):
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    fields = {"bos_token": {"content": "b"}, "eos_token": "c", "chat_template": templates}
    found = Tokenizer.from_folder(saved(tmp_path, tokenizer_config=fields, generation_config={}))
    assert (found.bos_token_id, found.eos_token_ids, found.chat_template) == (1, (2,), "d")
    assert [found.apply_chat_template(USER, tools=tools) for tools in (None, [], [{}])] == ["d", "d", "t"]
    (again := tmp_path / "again").mkdir()
    found.save(again)
    assert Tokenizer.from_folder(again).tool_template == "t"
    for ids in (3, [3], [3, 2]):
        assert Tokenizer.from_folder(saved(tmp_path, config={"eos_token_id": ids})).eos_token_ids == (2, 3)
    empty = {"bos_token": None, "eos_token": None, "chat_template": None}
    found = Tokenizer.from_folder(
        saved(tmp_path, tokenizer_config=empty, generation_config={"eos_token_id": None})
    )
    assert (found.bos_token, found.eos_token_ids, found.chat_template) == (None, (), None)


def test_a_bos_token_outside_the_vocabulary_is_not_put_first(tmp_path: Path):
    for bos, ids in (("b", [1, 0]), ("<s>", [0]), (None, [0])):
        fields = {"add_bos_token": True, "bos_token": bos}
        assert Tokenizer.from_folder(saved(tmp_path, tokenizer_config=fields)).encode("a") == ids


def test_a_template_file_that_is_no_utf8(tmp_path: Path):
    (saved(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is no UTF-8 text; fetch the model again$"):
        Tokenizer.from_folder(tmp_path)


def test_text_that_is_no_utf8(byte_level):
    with pytest.raises(ValueError, match=r"^prompt holds bytes that are no UTF-8; give it as UTF-8 text$"):
        byte_level[0].encode(b"a\xfbb".decode("utf-8", "surrogateescape"))


USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ (messages|attr('__class__')).__name__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ open('/etc/passwd').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ '%s'.__mod__.__self__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ ",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'].nothing.more }}",
        "{{ raise_exception('roles must\\nalternate') }}",
    ],
)
def test_hostile_and_broken_templates_fail_in_one_line(template: str):
    with pytest.raises(ValueError, match="do not fit the chat template") as caught:
        with_template(template).apply_chat_template(USER)
    assert "\n" not in str(caught.value)


def test_templates_may_do_what_they_need():
    template = (
        "{%- for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{{ m.role }}:{{ m.content | trim }}|{% endfor %}{{ tools | tojson }}{{ strftime_now('%Y') | length }}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert with_template(template).apply_chat_template(USER, tools=[{"é": 1}]) == 'user:hi|[{"é": 1}]4>'
    with pytest.raises(ValueError, match="roles must alternate"):
        with_template("{{ raise_exception('roles must alternate') }}").apply_chat_template(USER)
    with pytest.raises(ValueError, match="has none"):
        with_template(None).apply_chat_template(USER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_pre": "strange"}, "pre-tokenizer 'strange'"),
        ({"tokenizer_model": "t5"}, "tokenizer 't5'"),
        ({"token_types": [1, 1]}, "is damaged"),
        ({"token_merges": ["a z"]}, "is damaged"),
        ({"bos_token_id": 77}, "is damaged"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path: Path, change: dict, message: str):
    good = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": ["a", "b", "ab"]}
    good |= {"token_types": [1, 1, 1], "token_merges": ["a b"], "bos_token_id": 0}
    assert through_gguf(tmp_path / "good.gguf", **good).encode("ab") == [2]
    with pytest.raises(ValueError, match=message) as caught:
        through_gguf(tmp_path / "bad.gguf", **good | change)
    assert "\n" not in str(caught.value)
