"""Runs the model's step on chosen rows, pages and cache contents, and returns every logit."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdet.engine.batch import model_batch, placed
from jaxdet.engine.buckets import Buckets
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.models.layers import KVCache
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import PAGE_SIZE

MAX_SEQS, MAX_TOKENS, PREFILL_SEQS = 64, 512, 8
BUCKETS = Buckets(MAX_SEQS, 2 * MAX_TOKENS, PREFILL_SEQS)
"""Room for the reference and its neighbours in one step."""
POOL = 80
"""Pages of the cache: one for each of 64 sequences, and some."""
LENGTH, ROOM = 500, 512
"""Tokens of the reference: four pages, no multiple of anything; a softmax over all of them is one that XLA reorders.
And of the context that a model must have for it."""
LONG, MODEL_LEN = 1124, 1152
"""Tokens of a sequence that is longer than any backend's segment of attention."""
HOSTILE_PAGES = 4
"""Pages that neighbours read; their contents come from `NEIGHBOURS`."""
NEIGHBOURS = {"random": None, "NaN": np.nan, "inf": np.inf, "1e30": 1e30}


class Row(NamedTuple):
    """Tokens `start` to `end` of a sequence; what is before them must be in `pages`."""

    tokens: list[int]
    start: int
    end: int
    pages: list[int]


class Probe:
    """One reference sequence of random tokens and ways to compute its logits.

    Args:
        step: the model.
        length: of the sequence, up to MODEL_LEN.
        seed: of its tokens and of the neighbours'.
    """

    def __init__(self, step: Step, length: int = LENGTH, seed: int = 0):
        self.step, self.rng = step, np.random.default_rng(seed)
        vocab = step.config.vocab_size
        self.tokens: list[int] = self.rng.integers(0, vocab, length).tolist()
        self.table = MODEL_LEN // PAGE_SIZE
        self.hostile = list(range(POOL - HOSTILE_PAGES, POOL))
        self.own = list(range(1, self.table + 1))

    def cache(self, neighbour: str = "NaN") -> KVCache:
        """A pool in which every page holds the neighbours' contents; the reference's own are written by `run`."""
        value, c = NEIGHBOURS[neighbour], self.step.config
        shape = (POOL, c.num_kv_heads, PAGE_SIZE, c.head_dim)
        if value is None:
            content = jnp.asarray(self.rng.standard_normal(shape), self.step.dtype)
        else:
            content = jnp.full(shape, value, self.step.dtype)
        return [(content.copy(), content.copy()) for _ in range(c.num_layers)]

    def stranger(self, count: int) -> Row:
        """A neighbour with random tokens whose context is the hostile pages."""
        most = min(len(self.tokens), HOSTILE_PAGES * PAGE_SIZE) - count
        start = int(self.rng.integers(min(1, most), most + 1))
        tokens = self.rng.integers(0, self.step.config.vocab_size, start + count).tolist()
        return Row(tokens, start, start + count, self.hostile)

    def me(self, start: int, count: int, pages: list[int] | None = None) -> Row:
        """Tokens of the reference sequence."""
        return Row(self.tokens, start, start + count, pages or self.own)

    def run(self, cache: KVCache, rows: Iterable[Row]) -> tuple[list[np.ndarray], KVCache]:
        """float32 logits [tokens, V] of every row, and the cache with their keys and values."""
        parts = [Part(sequence_of(row), row.start, row.end - row.start, [], True) for row in rows]
        plan = Plan([p for p in parts if p.count == 1], [p for p in parts if p.count > 1])
        bucket = BUCKETS.fit(len(plan.rows), sum(p.count for p in plan.chunks), len(plan.chunks))
        batch, _ = model_batch(plan, bucket, self.table)
        logits, cache = self.step.forward(cache, batch)
        found = np.asarray(logits)
        first = {id(part): at for part, at in placed(plan, bucket)}
        return [found[first[id(p)] : first[id(p)] + p.count] for p in parts], cache

    def whole(self, cache: KVCache, chunk: int, pages: list[int] | None = None) -> tuple[np.ndarray, KVCache]:
        """Logits [tokens, V] of the reference sequence, `chunk` tokens a step."""
        parts = []
        for at in range(0, len(self.tokens), chunk):
            row = self.me(at, min(chunk, len(self.tokens) - at), pages)
            (part,), cache = self.run(cache, [row])
            parts.append(part)
        return np.concatenate(parts), cache

    @functools.cached_property
    def reference(self) -> np.ndarray:
        """Logits of the sequence alone, in a clean pool, prefilled at once (by MAX_TOKENS if it is longer)."""
        clean = jax.tree.map(jnp.zeros_like, self.cache())
        return self.whole(clean, MAX_TOKENS)[0]


def sequence_of(row: Row, params: SamplingParams | None = None, max_tokens: int = 1) -> Sequence:
    """The sequence of the row's tokens up to its end, in its pages, that goes on as `params` say."""
    params = params or SamplingParams()
    sequence = Sequence(
        request_id="",
        prompt=row.tokens[: row.end],
        params=params,
        sample_index=0,
        seed=params.seed or 0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
    )
    sequence.pages = row.pages
    return sequence
