"""Sampling on Hopper: launches read the logits in chunks of a row that all SMs share.

The largest logit → the edge of top-k (`top_k_sm90`) → the largest noisy logit, and top-p by rejection (`rounds_sm90`).
No sum's order depends on more than its own row. x = logit · (1 / temperature), rounded; noise and ties as `op.sample`
says.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, require_hopper
from pallas_kernels.reduce import pin
from pallas_kernels.sample import rounds_sm90, top_k_sm90
from pallas_kernels.sample.chunks_sm90 import (
    CHUNK,
    aligned,
    better,
    chunks_of,
    earliest,
    full,
    launch,
    sweep,
)
from pallas_kernels.sample.logprobs_sm90 import token_logprobs
from pallas_kernels.sample.xla import INT32_MAX

__all__ = ["sample", "token_logprobs"]


def sample(logits, rows):
    """See `op.sample`."""
    require_hopper("sample")
    vocab = logits.shape[1]
    logits = aligned(logits)
    if chunks_of(logits.shape[1]) > rounds_sm90.CHUNKS:
        most = rounds_sm90.CHUNKS * CHUNK
        raise ValueError(f"sample: {vocab} tokens; mosaic_gpu takes up to {most}; use backend='xla'")
    best, first = _peak(logits.shape, interpreting())(logits)
    peak = jnp.max(best, axis=1)
    greedy = jnp.min(jnp.where(best == peak[:, None], first, INT32_MAX), axis=1)
    greedy, usable = jnp.where(greedy == INT32_MAX, 0, greedy), jnp.isfinite(peak)
    if rows is None:
        return greedy, usable
    token = jnp.where(rows.temperature > 0, -1, greedy)
    with jax.enable_x64(False):  # the kernels' loops count in int32
        return rounds_sm90.draw(logits, *edges(logits, peak, rows), rows, token), usable


def edges(logits, peak, rows):
    """(scale, largest x, edge, cut): min-p and top-k keep x above the edge, and ids up to the cut at it."""
    drawn = rows.temperature > 0
    scale = jnp.where(drawn, 1.0 / jnp.where(drawn, rows.temperature, 1.0), 1.0)
    peak = pin(peak * scale)
    floor = jnp.where(rows.min_p > 0, pin(peak + jnp.log(rows.min_p)), -jnp.inf)
    floor = jnp.maximum(floor, jnp.finfo(jnp.float32).min)  # −inf is never kept
    edge, cut = top_k_sm90.edge(logits, scale, floor, jnp.where(drawn, rows.top_k, 0))
    return scale, peak, jnp.maximum(edge, floor), jnp.where(edge >= floor, cut, INT32_MAX)


@functools.cache
def _peak(shape, _interpreting):
    """Per chunk the largest logit, NaN if there is one, and the lowest id of the largest number."""

    def sample_peak(x_g, best_g, first_g):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        def visit(pieces, state):
            best, first, largest = state
            for x, ids in pieces:
                best, first = better(x, ids, best, first)
                largest = jnp.maximum(largest, x)  # a NaN stays
            return best, first, largest

        state = full(-jnp.inf), full(INT32_MAX, jnp.int32), full(-jnp.inf)
        best, first, largest = sweep(x_g, row, chunk, visit, state)
        best_g[row, chunk] = jnp.max(largest)
        first_g[row, chunk] = earliest(best, first)[1]

    size = shape[0], chunks_of(shape[1])
    out_type = jax.ShapeDtypeStruct(size, jnp.float32), jax.ShapeDtypeStruct(size, jnp.int32)
    return launch(sample_peak, shape, out_type)
