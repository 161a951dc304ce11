"""The gradient of a log-probability on Hopper: one pass over the logits, with the two numbers a row that were saved.

d logits = (one-hot − 2^((x − largest − log sum) · log2 e)) · d logprob in float32; exact zeros where d logprob is 0,
be the logits NaN. Every value depends on its logit and four numbers of its row, so that no bit depends on where it is.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, pl, plgpu
from pallas_kernels.sample.chunks_sm90 import LOADS, LOG2_E, PIECE, aligned, full, load_piece, vector
from pallas_kernels.sample.logprobs_sm90 import log_sum_exp
from pallas_kernels.sample.xla import normalised


def forward(_kernel, logits, ids, *, top):
    """(`token_logprobs`' results, what its gradient wants of them: every row's largest logit and log of the sum)."""
    saved = log_sum_exp(logits)
    return normalised(logits, ids, *saved, top=top), saved


def token_logprobs(logits, ids, saved, d_logprob):
    """d logits in float32, with what `forward` saved."""
    peak, total = (x[:, 0] for x in saved)
    x = aligned(logits)
    return _gradient(x.shape, interpreting())(x, peak, total, ids, d_logprob)[:, : logits.shape[1]]


@functools.cache
def _gradient(shape, _interpreting):
    def logprob_gradient(x_g, peak_g, total_g, id_g, dy_g, dx_g):
        row, part = lax.axis_index("row"), lax.axis_index("part")
        starts = [part * (LOADS * PIECE) + j * PIECE for j in range(LOADS)]
        dy = dy_g[row]

        @pl.when(dy == 0.0)
        def _():
            for wanted in starts:
                start = jnp.minimum(wanted, shape[1] - PIECE)
                dx_g.at[row, pl.ds(start, PIECE)][...] = full(0)

        @pl.when(dy != 0.0)
        def _():
            peak, total, chosen, scale = (vector(x) for x in (peak_g[row], total_g[row], id_g[row], dy))
            for start, x, ids in [load_piece(x_g, row, wanted) for wanted in starts]:
                probs = jnp.exp2((x - peak - total) * LOG2_E)
                # What two pieces at a row's end share gets the same value from both.
                dx_g.at[row, pl.ds(start, PIECE)][...] = (jnp.where(ids == chosen, 1.0, 0.0) - probs) * scale

    return plgpu.kernel(
        logprob_gradient,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(shape[0], -(-shape[1] // (LOADS * PIECE))),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
