"""Compiles everything at start, several programs at a time."""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jaxdet.engine.batch import ADJUSTMENT_BUCKETS
from jaxdet.engine.buckets import Bucket, Buckets
from jaxdet.engine.step import Step
from jaxdet.models.layers import Batch, KVCache
from jaxdet.sampling_params import MAX_LOGPROBS
from pallas_kernels.sample.op import Adjustments, SamplingRows

COPY_BUCKETS = (4, 64, 1024)
"""Pages copied at once."""
MOST_THREADS = 16
_shape: Any = jax.ShapeDtypeStruct


Programs = tuple[Step, KVCache, jax.Array]
"""A model with its cache and its last tokens, of which only shapes matter."""


def compile_all(
    target: Programs, drafter: Programs | None, buckets: Buckets, table: int, *, steps: int, progress: bool
) -> None:
    """Compiles the programs of every bucket.

    Args:
        drafter: the small model that guesses, if there is one.
        table: length of a block table.
        steps: decode steps that may be taken at once.
        progress: show a bar.
    """
    jobs = [
        *(_decode_jobs(*target, buckets, table, steps) if steps > 1 else ()),
        *_model_jobs(*target, buckets, table, drawn=_sampled(buckets)),
        *_request_jobs(target[0], buckets),
    ]
    if drafter is not None:  # it guesses for decoding rows alone, and nobody asks it for more than tokens
        jobs += _model_jobs(*drafter, buckets, table, drawn=buckets.rows)
    with (
        concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
        tqdm(total=len(jobs), desc="Compiling", unit="program", disable=not progress) as bar,
    ):
        try:
            for done in concurrent.futures.as_completed([pool.submit(job) for job in jobs]):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sampled(buckets: Buckets) -> list[int]:
    """How many rows of logits a step may have."""
    return sorted({bucket.sampled for bucket in buckets.all()})


def _model_jobs(
    step: Step, cache: KVCache, last_tokens: jax.Array, buckets: Buckets, table: int, *, drawn: list[int]
) -> Iterator[Callable[[], object]]:
    """What compiles a model, its choice of tokens from `drawn` rows, and copies of its pages; the slowest first."""
    compiler, of, bind = step.compiler(), _shape, functools.partial
    cache, last = jax.eval_shape(lambda: (cache, last_tokens))
    for bucket in buckets.all():
        tokens = of((bucket.rows + bucket.tokens,), jnp.int32)
        yield bind(compiler.run, cache, last, tokens, _batch(bucket, table))
    for size in drawn:
        logits, ids = of((size, step.config.vocab_size), jnp.float32), of((size,), jnp.int32)
        for rows in (None, _sampling_rows(size)):
            yield bind(compiler.draw, logits, rows, ids, last)
    for size in COPY_BUCKETS:
        yield bind(compiler.copy_pages, cache, *[of((size,), jnp.int32)] * 2)


def _decode_jobs(
    step: Step, cache: KVCache, last_tokens: jax.Array, buckets: Buckets, table: int, steps: int
) -> Iterator[Callable[[], object]]:
    """What compiles several decode steps in a row."""
    compiler, bind = step.compiler(), functools.partial
    cache, last = jax.eval_shape(lambda: (cache, last_tokens))
    for size in buckets.rows:
        ints, batch = _shape((size,), jnp.int32), _batch(Bucket(size, 0, 0), table)
        for rows in (None, _sampling_rows(size)):
            yield bind(compiler.decode, cache, last, ints, batch, ints, rows, ints, steps=steps)


def _request_jobs(step: Step, buckets: Buckets) -> Iterator[Callable[[], object]]:
    """What compiles the programs that requests ask for: adjusted and constrained logits, log-probabilities."""
    compiler, of, bind = step.compiler(), _shape, functools.partial
    vocab, top = step.config.vocab_size, min(MAX_LOGPROBS, step.config.vocab_size)
    for size in _sampled(buckets):
        logits, ids = of((size, vocab), jnp.float32), of((size,), jnp.int32)
        yield bind(compiler.logprobs, logits, ids, top=top)
        for length in ADJUSTMENT_BUCKETS:
            yield bind(compiler.adjust, logits, _adjustments(length))
        yield bind(compiler.restrict, logits, of((size, -(-vocab // 32)), jnp.uint32))
    for size in sorted({bucket.rows + bucket.tokens for bucket in buckets.all()}):
        hidden = of((size, step.config.hidden_size), step.dtype)
        yield bind(compiler.score, hidden, of((size,), jnp.int32), top=top)


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
