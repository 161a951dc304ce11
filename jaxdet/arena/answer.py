"""One completion as it grows: its tokens, and what its logits were to the last bit."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

KEPT = 64
"""Logits that are kept of every token: the largest. All of them go into the digest."""


class Answer:
    """A completion.

    Args:
        batch: how many requests ran with it, itself included.
    """

    def __init__(self, batch: int):
        self.batch = batch
        self.tokens: list[int] = []
        self._largest: list[tuple[np.ndarray, np.ndarray]] = []
        """Per token the ids and values of the largest logits and of its own."""
        self.bits: list[bytes] = []
        """Per token the SHA-256 of all its logits."""

    def add(self, token: int, logits: Float[np.ndarray, " V"]) -> None:
        """Takes a token and the float32 logits that chose it."""
        row = np.ascontiguousarray(logits, np.float32)
        best = np.argpartition(row, -KEPT)[-KEPT:] if row.size > KEPT else np.arange(row.size)
        ids = np.append(best, token)
        self.tokens.append(token)
        self._largest.append((ids, row[ids]))
        self.bits.append(hashlib.sha256(row.astype("<f4", copy=False).data).digest())

    def logit(self, at: int, token: int) -> float | None:
        """A token's logit where the answer's token `at` was chosen; None if it was not among the largest."""
        ids, values = self._largest[at]
        found = values[ids == token]
        return float(found[0]) if found.size else None

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens and all their logits."""
        found = hashlib.sha256()
        for token, bits in zip(self.tokens, self.bits, strict=True):
            found.update(token.to_bytes(4, "little") + bits)
        return found.hexdigest()


def digest(answers: Iterable[Answer]) -> str:
    """SHA-256 of the distinct answers, however often each was given and in whatever order."""
    return hashlib.sha256("".join(sorted({answer.digest for answer in answers})).encode()).hexdigest()
