"""Who meets whom in attention's gradient on Hopper: tiles of queries, and for each tile of keys who sees it.

In "tile space" every sequence's queries begin at a multiple of the tile, and what fills up its last tile is zero. So a
query's place in its tile, and with it every order, depends on its sequence alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.tiles import tiles

QUERIES = 64
"""Queries of a chunk, that a tile of keys meets in one step; chunks begin at multiples of it in their sequence."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """Tiles of `tile` queries of one sequence each; surplus ones have no keys."""

    sequence: Int[Array, " n"]
    position: Int[Array, " n"]
    """Position of the first query."""
    keys: Int[Array, " n"]
    """Keys of the sequence; 0 in a surplus tile."""
    rows: Int[Array, "n tile"]
    """Row of each query among all queries; the number of rows where there is none."""
    place: Int[Array, " T"]
    """Where each row is in tile space; the size of tile space where it is no sequence's."""
    first: Int[Array, " S"]
    """Where each sequence begins in tile space."""


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


def query_tiles(query_start, seq_lens, tokens: int, tile: int) -> QueryTiles:
    """The tiles of `tokens` rows of queries."""
    lengths = query_start[1:] - query_start[:-1]
    sequence, start = tiles(query_start, tile, min(tokens, -(-tokens // tile) + seq_lens.shape[0]))
    at = start[:, None] + jnp.arange(tile, dtype=jnp.int32)
    rows = jnp.where(at < lengths[sequence][:, None], query_start[sequence][:, None] + at, tokens)
    size = rows.size
    place = jnp.full(tokens + 1, size, jnp.int32).at[rows.reshape(-1)].set(jnp.arange(size, dtype=jnp.int32))
    filled = -(-lengths // tile) * tile
    return QueryTiles(
        sequence,
        (seq_lens - lengths)[sequence] + start,
        jnp.where(start < lengths[sequence], seq_lens[sequence], 0),
        rows,
        place[:tokens],
        (jnp.cumsum(filled) - filled).astype(jnp.int32),
    )


def to_tiles(x: Float[Array, "T H D"], tiles: QueryTiles) -> Float[Array, "size H D"]:
    """Rows in tile space; zeros where there is none."""
    return x.at[tiles.rows.reshape(-1)].get(mode="fill", fill_value=0)


def to_rows(x: Float[Array, "size H D"], tiles: QueryTiles) -> Float[Array, "T H D"]:
    """The inverse of `to_tiles`; zeros in rows of no sequence."""
    return x.at[tiles.place].get(mode="fill", fill_value=0)


def key_tiles(block_tables, query_start, seq_lens, queries: QueryTiles, pool, keys: int, window) -> KeyTiles:
    """The entries of every tile of `keys` keys; `pool` is (number of pages, keys of a page)."""
    pages, page = pool
    per_page = page // keys
    begin = jnp.arange(block_tables.shape[1] * per_page, dtype=jnp.int32) * keys
    lengths = query_start[1:] - query_start[:-1]
    before = begin - (seq_lens - lengths)[:, None]  # keys from the first query to the tile
    low = jnp.maximum(before, 0) // QUERIES
    high = jnp.broadcast_to(-(-lengths // QUERIES)[:, None], low.shape)
    if window is not None:
        high = jnp.minimum(high, (before + (keys + window - 2)) // QUERIES + 1)
    count = jnp.where(begin < seq_lens[:, None], jnp.maximum(high - low, 0), 0)
    number = jnp.repeat(block_tables, per_page, axis=1) * per_page + (begin // keys) % per_page
    ids = jnp.arange(pages * per_page, dtype=jnp.int32)
    number = jnp.where(count > 0, number, ids.size).reshape(-1)
    order = jnp.argsort(number, stable=True)
    chunks = jnp.zeros(ids.size, jnp.int32).at[number].add(count.reshape(-1), mode="drop")
    entries = (
        count,
        queries.first[:, None] // QUERIES + low,
        low * QUERIES - before,
        jnp.minimum(seq_lens[:, None] - begin, keys),
    )
    entries = (jnp.broadcast_to(x, count.shape).reshape(-1)[order].astype(jnp.int32) for x in entries)
    return KeyTiles(jnp.sum(number[None] < ids[:, None], axis=1, dtype=jnp.int32), chunks, *entries)
