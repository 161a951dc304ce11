"""The few shapes that steps are padded to, so that every program can be compiled before the first request."""

import dataclasses

from pallas_kernels.arrays import round_up
from pallas_kernels.matmul.op import whole_rows

SMALLEST_CHUNK = 32
FINEST_CHUNK = 512
"""Up to here sizes double; above they quadruple."""
FINEST_ROWS = 512
"""From here on decoding rows have a size halfway to the next power of two as well: many rows pay for each of them."""
MIXED_ROWS = 8, 128
"""Decoding rows beside prompts, guesses included: few sizes, for each is compiled for every size of prompts.

Up to the last of them rows cost less beside prompts, where weights are read anyway, than in a step of their own. More
fill whole tiles by themselves, and what is left of a larger size would be computed with every prompt.
"""
ROW_TILE = 64


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Sizes of a step: decoding rows, then `tokens` of `seqs` prompts."""

    rows: int
    tokens: int
    seqs: int

    @property
    def sampled(self) -> int:
        """Rows of logits."""
        return self.rows + self.seqs


@dataclasses.dataclass(frozen=True)
class Buckets:
    """All shapes of an engine: its limits, and below them powers of two (and four, for long prompts).

    Args:
        max_rows: decoding rows of a step, drafts included.
        max_tokens: prompt tokens of a step.
        max_seqs: prompts of a step.
        backend: the model's; rows and tokens together are as many as its products take without a copy.
    """

    max_rows: int
    max_tokens: int
    max_seqs: int
    backend: str = "xla"

    @property
    def rows(self) -> list[int]:
        sizes = _sizes(1, self._most_rows, self._most_rows)
        between = [3 * size // 2 for size in sizes if size >= FINEST_ROWS and 3 * size // 2 < self._most_rows]
        return sorted(sizes + between)

    @property
    def _most_rows(self) -> int:
        """Whole tiles of the matrix products, where there is more than one: 1000 rows would be padded at each."""
        if self.max_rows <= ROW_TILE:
            return self.max_rows
        return whole_rows(round_up(self.max_rows, ROW_TILE), self.backend)

    @property
    def tokens(self) -> list[int]:
        return _sizes(SMALLEST_CHUNK, whole_rows(self.max_tokens, self.backend), FINEST_CHUNK)

    @property
    def most_mixed_rows(self) -> int:
        """Decoding rows beside prompts; where there are more, they and the prompts take turns."""
        return min(self._most_rows, MIXED_ROWS[-1])

    @property
    def mixed_rows(self) -> list[int]:
        return [*(rows for rows in MIXED_ROWS if 2 * rows < self.most_mixed_rows), self.most_mixed_rows]

    @property
    def mixed_tokens(self) -> list[int]:
        return self.tokens[::-2][::-1]

    def fit(self, rows: int, tokens: int, seqs: int) -> Bucket:
        """The smallest bucket for a step."""
        if not seqs:
            return Bucket(_first(self.rows, rows), 0, 0)
        if not rows:
            return Bucket(0, _first(self.tokens, tokens), 1 if seqs == 1 else self.max_seqs)
        return self._mixed(_first(self.mixed_rows, rows), _first(self.mixed_tokens, tokens))

    def _mixed(self, rows: int, tokens: int) -> Bucket:
        return Bucket(rows, whole_rows(rows + tokens, self.backend) - rows, self.max_seqs)

    def all(self) -> list[Bucket]:
        """Every bucket that `fit` may give, the largest first."""
        decode = [Bucket(rows, 0, 0) for rows in self.rows]
        prefill = [Bucket(0, tokens, seqs) for tokens in self.tokens for seqs in sorted({1, self.max_seqs})]
        mixed = [self._mixed(r, t) for r in self.mixed_rows for t in self.mixed_tokens]
        return sorted(decode + prefill + mixed, key=lambda b: -b.rows - b.tokens)


def _sizes(smallest: int, largest: int, finest: int) -> list[int]:
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size)
        size *= 2 if size < finest else 4
    return [*sizes, largest]


def _first(sizes: list[int], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)
