"""How Hopper kernels read logits: a row in chunks that all SMs share, a chunk in pieces of 16 bytes a lane."""

import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, plgpu

PIECE = 512
LOADS = 4
CHUNK = 4 * LOADS * PIECE
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


def load_piece(x_g, row, wanted):
    """(where the piece begins, its values, their ids); earlier than `wanted` if it would go past the row's end."""
    start = jnp.minimum(wanted, x_g.shape[1] - PIECE)
    x = plgpu.load(x_g.at[row, pl.ds(start, PIECE)], layout=VECTOR)
    return start, x, plgpu.broadcasted_iota(jnp.int32, (PIECE,), 0, layout=VECTOR) + start


def vector(value):
    """A scalar in every element."""
    return plgpu.layout_cast(lax.broadcast_in_dim(value, (PIECE,), []), VECTOR)


def full(value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((PIECE,), value, dtype), VECTOR)
