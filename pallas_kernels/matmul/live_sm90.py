"""Which chunks of rows have a gradient at all, on Hopper: a chunk is read until something in it is not zero."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import interpreting, plgpu
from pallas_kernels.numerics import GRADIENT_ROWS

PIECE = 64 * GRADIENT_ROWS
"""Values read at once by a CTA."""
PARTS = 16
"""CTAs per chunk: one alone would take long over a chunk of zeros."""


def live_chunks(dy):
    """(numbers of the chunks of GRADIENT_ROWS rows that are not all zero, ascending; how many [1]), int32.

    The first has room for all chunks; what follows the last live one is no chunk's number.

    Args:
        dy: [M, N] in bfloat16 or float16, M a multiple of GRADIENT_ROWS and N of 64.
    """
    chunks = dy.shape[0] // GRADIENT_ROWS
    pieces = dy.reshape(chunks, -1, PIECE)
    found = _kernel(pieces.shape, interpreting())(pieces)
    so_far = jnp.cumsum(jnp.any(found > 0, axis=1), dtype=jnp.int32)
    # Chunks before the i-th live one have seen at most i of them.
    ahead = so_far[:, None] <= jnp.arange(chunks, dtype=jnp.int32)
    return jnp.sum(ahead, axis=0, dtype=jnp.int32), so_far[-1:]


@functools.cache
def _kernel(shape, _interpreting):
    chunks, pieces, size = shape
    parts = min(PARTS, pieces)

    def body(dy_g, found_g):
        chunk, part = lax.axis_index("chunk"), lax.axis_index("part")

        def read(state):
            piece, _ = state
            values = plgpu.load(dy_g.at[chunk, piece], layout=plgpu.Layout.WG_STRIDED((size,), vec_size=8))
            return piece + parts, jnp.max(jnp.where(values.astype(jnp.float32) == 0.0, 0.0, 1.0))

        none = lambda state: (state[0] < pieces) & (state[1] == 0.0)  # noqa: E731
        found_g[chunk, part] = lax.while_loop(none, read, (part, jnp.float32(0.0)))[1]

    return plgpu.kernel(
        body,
        kernel_name="live_chunks",
        out_type=jax.ShapeDtypeStruct((chunks, parts), jnp.float32),
        grid=(chunks, parts),
        grid_names=("chunk", "part"),
    )
