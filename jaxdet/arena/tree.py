"""Where answers diverge: what they share, then a branch for every token that some of them went on with."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxdet.arena.answer import Answer
from jaxdet.tokenizer import DecodeStream, Tokenizer


def divergence_tree(answers: Sequence[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    """The answers as JSON: `text` and `tokens` of the part that they share, and `branches` where it ends.

    A token has a `piece` of text, an `id`, and `logits`: each different value, in decimal and to the last bit in
    hexadecimal, with the number of answers that saw it. A branch has a `count`, the `batches` its answers ran in, the
    `candidates` (the tokens of all branches, with their logits as this branch's answers saw them; a token below their
    64 largest has none), `chosen`, and its own tree.
    """
    return _node(list(answers), 0, tokenizer)


def _node(answers: list[Answer], start: int, tokenizer: Tokenizer) -> dict[str, Any]:
    first, end = answers[0], start
    while end < len(first.tokens) and len({a.tokens[end] for a in answers if end < len(a.tokens)}) == 1:
        end += 1
    node: dict[str, Any] = {
        "text": _text(first.tokens, start, end, tokenizer),
        "tokens": [_token(first.tokens[at], at, answers, tokenizer) for at in range(start, end)],
        "branches": [],
    }
    if end < len(first.tokens):
        groups: dict[int, list[Answer]] = {}
        for answer in answers:
            groups.setdefault(answer.tokens[end], []).append(answer)
        for token, group in sorted(groups.items(), key=lambda item: -len(item[1])):
            branch = {
                "at": end + 1,
                "chosen": token,
                "count": len(group),
                "batches": sorted({answer.batch for answer in group}),
                "candidates": [_token(other, end, group, tokenizer) for other in groups],
            }
            node["branches"].append(branch | _node(group, end, tokenizer))
    return node


def _text(tokens: Sequence[int], start: int, end: int, tokenizer: Tokenizer) -> str:
    stream = DecodeStream(tokenizer, skip_special_tokens=False)
    return "".join([stream.step(token) for token in tokens[:end]][start:])


def _token(token: int, at: int, answers: Iterable[Answer], tokenizer: Tokenizer) -> dict[str, Any]:
    seen = Counter(answer.logit(at, token) for answer in answers)
    logits = [
        {"decimal": str(np.float32(value)), "hex": _hex(value), "count": count}
        for value, count in seen.most_common()
        if value is not None
    ]
    return {"piece": tokenizer.decode([token], skip_special_tokens=False), "id": token, "logits": logits}


def _hex(value: float) -> str:
    """C's hexadecimal notation, which says every bit: 0x1.26p+4."""
    mantissa, _, exponent = value.hex().partition("p")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}p{exponent}"
