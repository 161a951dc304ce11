"""Log-probabilities on Hopper: one launch reads the logits once and leaves two numbers per chunk of a row.

They are the chunk's largest logit and Σ 2^((x − largest) · log2 e). Their order depends on the row's length alone: a
thread adds its elements of a chunk in ascending id, then Mosaic's tree adds 128 threads. The chunks' sums, each scaled
by exp(chunk's largest − row's largest), are added in ascending order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, require_hopper
from pallas_kernels.reduce import pin
from pallas_kernels.sample.chunks_sm90 import (
    CHUNK,
    LOG2_E,
    PIECE,
    aligned,
    chunks_of,
    full,
    launch,
    piece,
    vector,
)
from pallas_kernels.sample.xla import normalised


def token_logprobs(logits, ids, *, top):
    """See `op.token_logprobs`."""
    return normalised(logits, ids, *log_sum_exp(logits), top=top)


def log_sum_exp(logits):
    """(max, log Σ exp(x − max)) of every row, [M, 1] each; −inf entries are exact no-ops."""
    require_hopper("token_logprobs")
    logits = aligned(logits)
    peaks, sums = _kernel(logits.shape, interpreting())(logits)
    peak = pin(jnp.max(peaks, axis=1, keepdims=True))
    parts = pin(sums * pin(jnp.exp(pin(peaks - peak))))
    total = parts[:, :1]
    for chunk in range(1, parts.shape[1]):
        total = total + parts[:, chunk : chunk + 1]
    return peak, pin(jnp.log(pin(total)))


@functools.cache
def _kernel(shape, _interpreting):
    def logprob_sums(x_g, peaks_g, sums_g):
        row, chunk = lax.axis_index("row"), lax.axis_index("chunk")
        pieces, largest = [], full(-jnp.inf)
        for j in range(CHUNK // PIECE):  # all in registers: the sum needs them after the largest is known
            pieces.append(piece(x_g, row, chunk * CHUNK + j * PIECE)[0])
        for x in pieces:
            largest = jnp.maximum(largest, x)  # a NaN stays
        peak = jnp.max(largest)
        total, peaks = full(0), vector(peak)
        for x in pieces:
            total = total + jnp.where(x == -jnp.inf, 0.0, jnp.exp2((x - peaks) * LOG2_E))
        peaks_g[row, chunk] = peak
        sums_g[row, chunk] = jnp.sum(total)

    size = shape[0], chunks_of(shape[1])
    return launch(logprob_sums, shape, (jax.ShapeDtypeStruct(size, jnp.float32),) * 2)
