"""Builds a tokenizer from a GGUF file's vocabulary, without torch."""

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxdet.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "llama-bpe": LLAMA3_PATTERN,
    "qwen2": LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
}
BYTE_LEVEL = ("gpt-2", "default", "smollm", *PATTERNS)


def read_tokenizer(fields: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata.

    Raises:
        ValueError: there is none, it is damaged, or its kind is not supported (named).
    """
    get = {k.removeprefix("tokenizer."): v for k, v in fields.items() if k.startswith("tokenizer.")}.get
    kind, pre, tokens = get("ggml.model"), get("ggml.pre", "default"), get("ggml.tokens")
    if tokens is None:
        raise ValueError(f"{name} holds no tokenizer; use a GGUF file with tokenizer.ggml.tokens")
    if kind != "llama" and not (kind == "gpt2" and pre in BYTE_LEVEL):
        raise ValueError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} in {name} is not supported; supported: llama, "
            f"gpt2 with {', '.join(BYTE_LEVEL)}"
        )
    try:
        return _build(get, kind, pre, tokens)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"the tokenizer in {name} is damaged ({error}); fetch the file again") from None


def _build(get: Callable[..., Any], kind: str, pre: str, tokens: list[str]) -> Tokenizer:
    types = get("ggml.token_type", [NORMAL] * len(tokens))
    if kind == "gpt2":
        backend = _byte_level(tokens, get("ggml.merges", []), pre)
    else:
        backend = _sentencepiece(tokens, get("ggml.scores", []), types, get("ggml.add_space_prefix", True))
    special = [t for t, k in zip(tokens, types, strict=True) if k == CONTROL]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    user = [t for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED]
    backend.add_tokens([AddedToken(t, normalized=False) for t in user])
    bos, eos = get("ggml.bos_token_id"), get("ggml.eos_token_id")
    ends = {eos, get("ggml.eot_token_id"), get("ggml.eom_token_id")}
    ends |= {backend.token_to_id(t) for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if t in special}
    return Tokenizer(
        backend,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
        eos_token_ids=sorted(i for i in ends if i is not None),
        chat_template=get("chat_template"),
        tool_template=get("chat_template.tool_use"),
        add_bos=bool(get("ggml.add_bos_token", kind == "llama")),
    )


def _byte_level(tokens: list[str], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    pairs = [tuple(m.split(" ", 1)) for m in merges]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))  # pyright: ignore
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in PATTERNS)
    steps: list[Any] = [byte_level]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pre in PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: list[str], scores: list[float], types: list[int], prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the score orders the merges; unknown characters fall back to bytes."""
    ids = {t: i for i, t in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind != NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], (left, right)))
    merges.sort()
    unknown = next((t for t, k in zip(tokens, types, strict=True) if k == UNKNOWN), None)
    model = models.BPE(ids, [m[3] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend
