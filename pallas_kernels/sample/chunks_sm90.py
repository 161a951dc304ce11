"""How Hopper kernels read logits: a row in chunks that all SMs share, a chunk in pieces of 16 bytes a lane."""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, plgpu
from pallas_kernels.sample.xla import INT32_MAX

PIECE = 512
LOADS = 4
CHUNK = 4 * LOADS * PIECE
GROUPS = CHUNK // PIECE
"""Of a chunk."""
VECTOR = plgpu.Layout.WG_STRIDED((PIECE,), vec_size=4)
LOG2_E = math.log2(math.e)


def aligned(logits):
    """The logits, with −inf up to the length that `load_piece` takes: at least PIECE, a multiple of 4."""
    vocab = logits.shape[1]
    if pad := max(PIECE - vocab, -vocab % 4):
        logits = jnp.pad(logits, ((0, 0), (0, pad)), constant_values=-jnp.inf)
    return logits


def chunks_of(vocab: int) -> int:
    return -(-vocab // CHUNK)


def groups_of(vocab: int) -> int:
    """How many groups of PIECE ids a row has."""
    return -(-vocab // PIECE)


def load_piece(x_g, row, wanted):
    """(where the piece begins, its values, their ids); earlier than `wanted` if it would go past the row's end."""
    start = jnp.minimum(wanted, x_g.shape[1] - PIECE)
    x = plgpu.load(x_g.at[row, pl.ds(start, PIECE)], layout=VECTOR)
    return start, x, plgpu.broadcasted_iota(jnp.int32, (PIECE,), 0, layout=VECTOR) + start


def piece(x_g, row, wanted):
    """(the values from `wanted` on, their ids); −inf before it and past the row's end."""
    _, x, ids = load_piece(x_g, row, wanted)
    return jnp.where(ids >= wanted, x, -jnp.inf), ids


def vector(value):
    """A scalar in every element."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value, (PIECE,), []), VECTOR)


def full(value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((PIECE,), value, dtype), VECTOR)


def sweep(x_g, row, chunk, visit, state):
    """`visit([(x, ids)], state)` over the pieces of a chunk, ids ascending; past the row's end x is −inf."""
    vocab = x_g.shape[1]

    def several(i, state):
        begin = chunk * CHUNK + i * (LOADS * PIECE)
        return visit([piece(x_g, row, begin + j * PIECE) for j in range(LOADS)], state)

    left = jnp.minimum(vocab - chunk * CHUNK, CHUNK)
    return lax.fori_loop(0, pl.cdiv(left, jnp.int32(LOADS * PIECE)), several, state)


def better(value, ids, best, first):
    """(`best`, `first`), or `value` and its id where it is larger."""
    larger = value > best
    return jnp.where(larger, value, best), jnp.where(larger, ids, first)


def earliest(best, first):
    """The largest of `best`, and of several the lowest of `first`; a NaN is the largest, without an id."""
    top = jnp.max(best)
    return top, jnp.min(jnp.where(best == top, first, jnp.int32(INT32_MAX)))


def launch(body, shape, out_type, scratch=(), *, per_row=False, approximate=True):
    """The kernel `body` over (row, chunk) of logits of `shape`, or over rows."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(shape[0], 1 if per_row else chunks_of(shape[1])),
        grid_names=("row", "chunk"),
        compiler_params=plgpu.CompilerParams(approx_math=approximate),
    )
