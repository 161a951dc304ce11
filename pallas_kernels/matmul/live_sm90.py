"""Which chunks of rows have a gradient at all, on Hopper: a chunk is read until something in it is not zero."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.arrays import round_up
from pallas_kernels.compat import interpreting, plgpu
from pallas_kernels.numerics import GRADIENT_ROWS

PIECE = 64 * GRADIENT_ROWS
"""Values read at once by a CTA."""
PARTS = 16
"""CTAs per chunk: one alone would take long over a chunk of zeros."""


def live_chunks(dy):
    """Per chunk of GRADIENT_ROWS rows and part of it: whether anything is not zero, for `live_flags`.

    float32 [parts, chunks rounded up to 128]; what is past the last chunk isn't written.

    Args:
        dy: [M, N] in bfloat16 or float16, M a multiple of GRADIENT_ROWS and N of 64.
    """
    pieces = dy.reshape(dy.shape[0] // GRADIENT_ROWS, -1, PIECE)
    return _kernel(pieces.shape, interpreting())(pieces)


def live_flags(found, flags, chunks: int):
    """(chunk -> whether it has a gradient, how many have), inside a kernel; every warpgroup for itself.

    Args:
        found: what `live_chunks` returned, in device memory.
        flags: a row of it in shared memory, this warpgroup's own.
        chunks: how many there are.
    """
    layout = plgpu.Layout.WG_STRIDED(flags.shape, vec_size=1)
    parts = (plgpu.load(found.at[part], layout=layout) for part in range(found.shape[0]))
    flags[...] = functools.reduce(jnp.maximum, parts)
    plgpu.commit_smem()

    def live(chunk):
        return flags[chunk] > 0

    return live, lax.fori_loop(0, chunks, lambda chunk, seen: seen + jnp.int32(live(chunk)), jnp.int32(0))


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
        found_g[part, chunk] = lax.while_loop(none, read, (part, jnp.float32(0.0)))[1]

    return plgpu.kernel(
        body,
        kernel_name="live_chunks",
        out_type=jax.ShapeDtypeStruct((parts, round_up(chunks, 128)), jnp.float32),
        grid=(chunks, parts),
        grid_names=("chunk", "part"),
    )
