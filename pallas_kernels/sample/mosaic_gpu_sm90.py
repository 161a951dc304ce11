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
    GROUPS,
    PIECE,
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
    with jax.enable_x64(False):  # the kernels' loops count in int32
        peak, greedy, groups = peaks(logits)
        usable = jnp.isfinite(peak)
        if rows is None:
            return greedy, usable
        token = jnp.where(rows.temperature > 0, -1, greedy)
        return rounds_sm90.draw(logits, *edges(logits, peak, groups, rows), rows, token), usable


def peaks(logits):
    """(every row's largest logit, the first id that has it, the largest of every group of ids)."""
    best, first, groups = _peak(logits.shape, interpreting())(logits)
    peak = jnp.max(best, axis=1)
    greedy = jnp.min(jnp.where(best == peak[:, None], first, INT32_MAX), axis=1)
    return peak, jnp.where(greedy == INT32_MAX, 0, greedy), groups


def edges(logits, peak, groups, rows):
    """(scale, largest x, edge, cut): min-p and top-k keep x above the edge, and ids up to the cut at it."""
    drawn = rows.temperature > 0
    scale = jnp.where(drawn, 1.0 / jnp.where(drawn, rows.temperature, 1.0), 1.0)
    peak = pin(peak * scale)
    floor = jnp.where(rows.min_p > 0, pin(peak + jnp.log(rows.min_p)), -jnp.inf)
    floor = jnp.maximum(floor, jnp.finfo(jnp.float32).min)  # −inf is never kept
    edge, cut = top_k_sm90.edge(logits, groups, scale, floor, jnp.where(drawn, rows.top_k, 0))
    return scale, peak, jnp.maximum(edge, floor), jnp.where(edge >= floor, cut, INT32_MAX)


@functools.cache
def _peak(shape, _interpreting):
    """Per chunk the largest logit, NaN if there is one, and the lowest id of the largest number.

    And the largest logit of every group of PIECE ids, for top-k.
    """

    def sample_peak(x_g, best_g, first_g, groups_g):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        def visit(pieces, state):
            best, first, largest, group = state
            for x, ids in pieces:
                best, first = better(x, ids, best, first)
                top = jnp.max(x)
                groups_g[row, group] = top
                largest, group = jnp.maximum(largest, top), group + 1  # a NaN stays
            return best, first, largest, group

        state = full(-jnp.inf), full(INT32_MAX, jnp.int32), jnp.float32(-jnp.inf), chunk * GROUPS
        best, first, largest, _ = sweep(x_g, row, chunk, visit, state)
        best_g[row, chunk], first_g[row, chunk] = largest, earliest(best, first)[1]

    chunks = chunks_of(shape[1])
    width = -(-chunks * GROUPS // PIECE) * PIECE  # pieces, too
    sizes = (chunks, jnp.float32), (chunks, jnp.int32), (width, jnp.float32)
    return launch(sample_peak, shape, tuple(jax.ShapeDtypeStruct((shape[0], n), dtype) for n, dtype in sizes))
