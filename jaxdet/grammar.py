"""JSON that completions must follow: llguidance says before every token which ones may come."""

import functools
import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from jaxdet.tokenizer import Tokenizer

KEPT, LONGEST_KEPT = 32, 16384
"""Compiled grammars that are kept, and characters of the longest: users repeat their schemas, and compiling one can
take as long as many steps. One of this length takes about 2 MB."""


class JsonGrammars:
    """Compiles JSON schemas for one tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: the model's number of logits; those beyond the tokenizer's tokens are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer = LLTokenizer(
            tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids)
        )
        self._words = -(-vocab_size // 32)
        self._kept = functools.lru_cache(KEPT)(self._build)

    def compile(self, schema: Mapping[str, Any]) -> "JsonConstraint":
        """A constraint at the beginning of an answer that follows a JSON schema.

        Raises:
            ValueError: llguidance can't follow the schema.
        """
        return self.start(self.of_schema(schema), "json_schema")

    @staticmethod
    def of_schema(schema: Mapping[str, Any]) -> str:
        """llguidance's grammar of a JSON schema, without white space between an answer's parts, for `start`.

        Raises:
            ValueError: the schema is none.
        """
        try:
            # White space would let a model go on for ever.
            return LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
        except (ValueError, RecursionError) as error:
            raise _refusal("json_schema", str(error)) from None

    def start(self, grammar: str, what: str) -> "JsonConstraint":
        """A constraint at the beginning of an answer that follows a grammar of llguidance's; the latest ones are kept.

        Args:
            what: the argument it was made from.

        Raises:
            ValueError: llguidance can't follow it.
        """
        try:
            return (self._kept if len(grammar) <= LONGEST_KEPT else self._build)(grammar)
        except ValueError as error:
            raise _refusal(what, str(error)) from None

    def _build(self, grammar: str) -> "JsonConstraint":
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return JsonConstraint(matcher, self._words)


class JsonConstraint:
    """Where one answer stands in its grammar; implements `jaxdet.engine.sequence.Constraint`."""

    def __init__(self, matcher: LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def allowed(self, guesses: list[int]) -> np.ndarray:
        matcher = self._matcher
        if guesses:
            matcher = matcher.deep_copy()
            matcher.consume_tokens(guesses)
        # llguidance gives a word too many where the vocabulary is a multiple of 32.
        found = np.frombuffer(matcher.compute_bitmask(), np.uint32)[: self._words]
        # After a failure llguidance allows the end, which would pass a broken answer off as a whole one.
        return np.zeros_like(found) if matcher.is_error() else found

    def append(self, token: int) -> None:
        self._matcher.consume_token(token)

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy(), self._words)


def _refusal(what: str, reason: str) -> ValueError:
    return ValueError(f"{what} can't be followed: {reason.splitlines()[0]}; use a simpler schema")
