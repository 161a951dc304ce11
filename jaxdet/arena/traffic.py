"""How busy the server is: batches of changing size, in which our request is one among other people's."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxdet.sampling_params import SamplingParams

SIZES = 6
"""Batch sizes of one run."""
LONGEST = 64
"""Tokens of other people's prompts."""


class Batch(NamedTuple):
    """Requests that run together."""

    size: int
    ours: int
    """How many of them are completions of the run."""


def batches(completions: int, load: int) -> list[Batch]:
    """Deals completions to batches of 1 to `load` requests, evenly over the sizes; at most half of a batch is ours."""
    sizes = sorted({round(size) for size in np.geomspace(1, load, SIZES).tolist()})
    waiting = {size: len(range(i, completions, len(sizes))) for i, size in enumerate(sizes)}
    found = []
    while any(waiting.values()):
        for size, left in waiting.items():
            ours = min(left, (size + 1) // 2)
            waiting[size] -= ours
            if ours:
                found.append(Batch(size, ours))
    return found


class Traffic:
    """Other people's requests of one batch, the same in every run.

    Args:
        number: of the batch.
        vocab_size: of the model; their prompts are random tokens.
    """

    def __init__(self, number: int, batch: Batch, vocab_size: int):
        self._rng, self._vocab_size = np.random.default_rng(number), vocab_size
        self.places = sorted(self._rng.permutation(batch.size)[: batch.ours].tolist())
        """Which of the batch's rows are ours."""

    def requests(self) -> Iterator[tuple[list[int], SamplingParams]]:
        """One after the other, without an end."""
        while True:
            length, tokens = self._rng.integers(4, (LONGEST, 40), endpoint=True).tolist()
            prompt = self._rng.integers(0, self._vocab_size, length).tolist()
            params = SamplingParams(
                temperature=float(self._rng.integers(2)), seed=length, max_tokens=tokens, ignore_eos=True
            )
            yield prompt, params
