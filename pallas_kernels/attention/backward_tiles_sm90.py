"""Which queries each tile of keys meets in attention's gradient on Hopper, in chunks of ROWS queries in tile space."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.online_softmax_sm90 import ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyTiles:
    """For every tile of keys in the pool, entries of the sequences that have it, in ascending sequence."""

    first: Int[Array, " tiles"]
    """Its first entry."""
    chunks: Int[Array, " tiles"]
    """Chunks of queries of all of its entries together."""
    count: Int[Array, " entries"]
    """Chunks of an entry, one or more."""
    place: Int[Array, " entries"]
    """The first chunk's place in tile space, in chunks."""
    ahead: Int[Array, " entries"]
    """Position of the first chunk's first query, counted from the tile's first key."""
    live: Int[Array, " entries"]
    """Keys of the tile that the sequence has."""
    queries: Int[Array, " entries"]
    """Queries of the sequence from the first chunk on."""


def key_tiles(block_tables, query_start, seq_lens, chunk, pool, keys: int, window) -> KeyTiles:
    """The entries of every tile of `keys` keys.

    Args:
        chunk: each sequence's first chunk in tile space.
        pool: (number of pages, keys of a page).
    """
    pages, page = pool
    per_page = page // keys
    begin = jnp.arange(block_tables.shape[1] * per_page, dtype=jnp.int32) * keys
    lengths = query_start[1:] - query_start[:-1]
    before = begin - (seq_lens - lengths)[:, None]  # keys from the first query to the tile
    low = jnp.maximum(before, 0) // ROWS
    high = jnp.broadcast_to(-(-lengths // ROWS)[:, None], low.shape)
    if window is not None:
        high = jnp.minimum(high, (before + (keys + window - 2)) // ROWS + 1)
    count = jnp.where(begin < seq_lens[:, None], jnp.maximum(high - low, 0), 0)
    number = jnp.repeat(block_tables, per_page, axis=1) * per_page + (begin // keys) % per_page
    ids = jnp.arange(pages * per_page, dtype=jnp.int32)
    number = jnp.where(count > 0, number, ids.size).reshape(-1)
    order = jnp.argsort(number, stable=True)
    mine = number == ids[:, None]
    chunks = jnp.sum(jnp.where(mine, count.reshape(-1), 0), axis=1, dtype=jnp.int32)
    entries = (
        count,
        chunk[:, None] + low,
        low * ROWS - before,
        jnp.minimum(seq_lens[:, None] - begin, keys),
        lengths[:, None] - low * ROWS,
    )
    entries = (jnp.broadcast_to(x, count.shape).reshape(-1)[order].astype(jnp.int32) for x in entries)
    return KeyTiles(jnp.sum(number < ids[:, None], axis=1, dtype=jnp.int32), chunks, *entries)
