"""Kernels as they would be if blocks cost nothing: no padding, every operand moved once.

This is what "bytes and operations reached" are counted by where no chip's limits are known, on a CPU above all.
"""

import jax.numpy as jnp

from jaxdet.models.config import ModelConfig
from jaxdet.roofline.kernel import Kernel

NORM_OPS, ROPE_OPS, SCORE_OPS, OUT_OPS, SAMPLE_OPS = 6, 8, 10, 4, 6
"""Elementwise operations: an element of a normalised row, of a rotated head, a score, an element of an attention
output a block of keys, a logit."""
SCALE_OPS, NOISE_OPS, LOGPROB_OPS = 6, 123, 16
"""More of a logit: divided by the temperature and cut by min-p; with its noise (20 rounds of Threefry) compared with
the best; weighed for the sum and ranked."""


def keys_seen(position: int, window: int | None) -> int:
    """Keys that the query at `position` attends to."""
    return position + 1 if window is None else min(position + 1, window)


def matmul(name, rows, k, n, dtype, *, halves=1, residual=False, out_size=None) -> Kernel:
    """[rows, k] × [k, n], or with two halves act(gate) · up; `out_size` are bytes of a value of the result."""
    size = jnp.dtype(dtype).itemsize
    moved = rows * k + halves * k * n + (rows * n if residual else 0)
    return Kernel(
        name=name,
        bytes=moved * size + rows * n * (out_size or size),
        flops=2 * halves * rows * k * n,
    )


def decode(config: ModelConfig, rows: int, context: int, window: int | None, dtype) -> Kernel:
    """Attention of one query for each of `rows` sequences, the last of `context` tokens."""
    return _attention(config, rows, rows * keys_seen(context - 1, window), None, dtype)


def prefill(config: ModelConfig, tokens: int, window: int | None, dtype) -> Kernel:
    """Attention of a whole prompt."""
    pairs = sum(keys_seen(position, window) for position in range(tokens))
    return _attention(config, tokens, pairs, tokens, dtype)


def _attention(config: ModelConfig, queries: int, pairs: int, keys: int | None, dtype) -> Kernel:
    """`pairs` of a query and a key, the keys read once: `keys` of them, or each pair's own."""
    c, size = config, jnp.dtype(dtype).itemsize
    cache = 2 * (pairs if keys is None else keys) * c.num_kv_heads * c.head_dim
    return Kernel(
        name="attention",
        bytes=(cache + 2 * queries * c.num_q_heads * c.head_dim) * size,
        flops=4 * pairs * c.num_q_heads * c.head_dim,
        vector=pairs * c.num_q_heads * SCORE_OPS,
    )


def rms_norm(rows: int, width: int, dtype) -> Kernel:
    """Reads and writes every row, reads the weights."""
    size = jnp.dtype(dtype).itemsize
    return Kernel(name="rms_norm", bytes=2 * rows * width * size + 4 * width, vector=NORM_OPS * rows * width)


def rope_cache(config: ModelConfig, tokens: int, dtype, *, scattered: bool) -> Kernel:
    """Queries, keys and values in; queries and cache entries out."""
    c, size = config, jnp.dtype(dtype).itemsize
    width = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    return Kernel(
        name="rope_cache",
        bytes=tokens * (2 * width * size + 4 * c.head_dim),
        vector=ROPE_OPS * tokens * width,
    )


def sample(rows: int, vocab: int) -> Kernel:
    """Greedy: the largest logit of every row."""
    return Kernel(name="sample, greedy", bytes=4 * rows * vocab, vector=SAMPLE_OPS * rows * vocab)


def draw(rows: int, vocab: int) -> Kernel:
    """Temperature, noise and the largest logit; finding the edges of top-k and top-p is the implementation's affair."""
    greedy = sample(rows, vocab)
    ops = SAMPLE_OPS + SCALE_OPS + NOISE_OPS
    return Kernel(name="sample, drawn", bytes=greedy.bytes, vector=ops * rows * vocab)


def token_logprobs(rows: int, vocab: int) -> list[Kernel]:
    """A token's own log-probability and rank, and the most likely tokens."""
    ops = SAMPLE_OPS + LOGPROB_OPS
    return [Kernel(name="token_logprobs", bytes=4 * rows * vocab, vector=ops * rows * vocab)]
