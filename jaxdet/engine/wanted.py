"""Every program that an engine may need, by the shapes of its arguments."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdet.engine.batch import ADJUSTMENT_BUCKETS
from jaxdet.engine.buckets import Bucket, Buckets
from jaxdet.engine.step import Step
from jaxdet.models.layers import Batch, KVCache
from jaxdet.sampling_params import MAX_LOGPROBS
from pallas_kernels.sample.op import Adjustments, SamplingRows

COPY_BUCKETS = (4, 64, 1024)
"""Pages copied at once."""
_shape: Any = jax.ShapeDtypeStruct

Job = Callable[[], Any]


class Programs(NamedTuple):
    """A model with its cache and its last tokens, of which only shapes matter."""

    step: Step
    cache: KVCache
    last_tokens: jax.Array


class Wanted(NamedTuple):
    """What an engine's programs depend on."""

    target: Programs
    drafter: Programs | None
    """The small model that guesses, if there is one."""
    buckets: Buckets
    table: int
    """Length of a block table."""
    steps: int
    """Decode steps that may be taken at once."""

    def jobs(self, twin: Callable[[Step], Step]) -> list[Job]:
        """What a twin of a step does with each program, such as compile it; in one order, the slowest first."""
        step, cache, last = self.target
        target, buckets, table = (twin(step), cache, last), self.buckets, self.table
        jobs = [
            *(_decode_jobs(*target, buckets, table, self.steps) if self.steps > 1 else ()),
            *_model_jobs(*target, buckets, table, drawn=_sampled(buckets)),
            *_request_jobs(target[0], buckets),
        ]
        if (
            self.drafter is not None
        ):  # it guesses for decoding rows alone, and nobody asks it for more than tokens
            drafter = twin(self.drafter.step), self.drafter.cache, self.drafter.last_tokens
            jobs += _model_jobs(*drafter, buckets, table, drawn=buckets.rows)
        return jobs


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes in the place of arrays."""
    return jax.tree.map(lambda x: _shape(x.shape, x.dtype), tree)


def _sampled(buckets: Buckets) -> list[int]:
    """How many rows of logits a step may have."""
    return sorted({bucket.sampled for bucket in buckets.all()})


def _model_jobs(
    twin: Step, cache: KVCache, last_tokens: jax.Array, buckets: Buckets, table: int, *, drawn: list[int]
) -> Iterator[Job]:
    """A model, its choice of tokens from `drawn` rows, and copies of its pages; the slowest first."""
    of, bind = _shape, functools.partial
    cache, last = shapes_of((cache, last_tokens))
    for bucket in buckets.all():
        tokens = of((bucket.rows + bucket.tokens,), jnp.int32)
        yield bind(twin.run, cache, last, tokens, _batch(bucket, table))
    for size in drawn:
        logits, ids = of((size, twin.config.vocab_size), jnp.float32), of((size,), jnp.int32)
        for rows in (None, _sampling_rows(size)):
            yield bind(twin.draw, logits, rows, ids, last)
    for size in COPY_BUCKETS:
        yield bind(twin.copy_pages, cache, *[of((size,), jnp.int32)] * 2)


def _decode_jobs(
    twin: Step, cache: KVCache, last_tokens: jax.Array, buckets: Buckets, table: int, steps: int
) -> Iterator[Job]:
    """Several decode steps in a row."""
    bind = functools.partial
    cache, last = shapes_of((cache, last_tokens))
    for size in buckets.rows:
        ints, batch = _shape((size,), jnp.int32), _batch(Bucket(size, 0, 0), table)
        for rows in (None, _sampling_rows(size)):
            yield bind(twin.decode, cache, last, ints, batch, ints, rows, ints, steps=steps)


def _request_jobs(twin: Step, buckets: Buckets) -> Iterator[Job]:
    """What requests ask for: adjusted and constrained logits, log-probabilities."""
    of, bind = _shape, functools.partial
    vocab, top = twin.config.vocab_size, min(MAX_LOGPROBS, twin.config.vocab_size)
    for size in _sampled(buckets):
        logits, ids = of((size, vocab), jnp.float32), of((size,), jnp.int32)
        yield bind(twin.logprobs, logits, ids, top=top)
        for length in ADJUSTMENT_BUCKETS:
            yield bind(twin.adjust, logits, _adjustments(length))
        yield bind(twin.restrict, logits, of((size, -(-vocab // 32)), jnp.uint32))
    for size in sorted({bucket.rows + bucket.tokens for bucket in buckets.all()}):
        hidden = of((size, twin.config.hidden_size), twin.dtype)
        yield bind(twin.score, hidden, of((size,), jnp.int32), top=top)


def _batch(bucket: Bucket, table: int) -> Batch:
    ints = lambda *shape: _shape(shape, jnp.int32)  # noqa: E731
    tokens, rows, seqs = ints(bucket.rows + bucket.tokens), bucket.rows, bucket.seqs
    prompts = ints(seqs, table), ints(seqs + 1), ints(seqs)
    return Batch(tokens, tokens, tokens, ints(rows, table), ints(rows), *prompts)


def _sampling_rows(size: int) -> SamplingRows:
    of = lambda kind: _shape((size,), kind)  # noqa: E731
    columns = [of(kind) for kind in ("float32", "int32", "float32", "float32", "int32", "int32")]
    columns.insert(4, _shape((size, 2), "uint32"))
    return SamplingRows(*columns)


def _adjustments(length: int) -> Adjustments:
    kinds = "int32", "int32", "float32", "bool", "int32", "float32", "float32", "float32"
    return Adjustments(*(_shape((length,), kind) for kind in kinds))
