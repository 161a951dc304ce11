"""Cuts the queries of several sequences into tiles of one sequence each."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Int

TILES = "attention_tiles"
"""The `checkpoint_name` of index arrays that depend on the batch alone, not on the layer. Rematerialisation should keep
them: they are small, and XLA shares them between layers only if they aren't computed again.
"""


def tiles(
    query_start: Int[Array, " S+1"], tile: int, count: int
) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
    """(sequence, first query) of every tile; surplus tiles repeat the last sequence past its end.

    Args:
        query_start: row at which each sequence starts; the last entry is the number of rows.
        tile: queries of a tile.
        count: number of tiles, at least as many as the sequences fill.
    """
    lengths = query_start[1:] - query_start[:-1]
    ends = jnp.cumsum(-(-lengths // tile))
    index = jnp.arange(count, dtype=jnp.int32)
    seq = jnp.minimum(jnp.sum(index[:, None] >= ends[None], axis=1), lengths.shape[0] - 1).astype(jnp.int32)
    begin = jnp.where(seq > 0, ends[jnp.maximum(seq - 1, 0)], 0)
    return seq, ((index - begin) * tile).astype(jnp.int32)


def most_tiles(tokens: int, tile: int, sequences: int, alignment: int = 1) -> int:
    """So many tiles cover `tokens` rows, however they are cut into sequences that begin at multiples of `alignment`."""
    step = math.gcd(tile, alignment)
    steps, per_tile = -(-tokens // step), tile // step
    return (steps + min(sequences, steps) * (per_tile - 1)) // per_tile
