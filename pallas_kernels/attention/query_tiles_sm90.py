"""Tiles of one sequence's queries each, for the Hopper kernels that take many queries at once.

In "tile space" every sequence's queries begin at a multiple of ROWS, where TMA and a warpgroup can take and leave them.
So no chunk of ROWS rows has two sequences, and a query's place in its tile depends on its sequence alone. The rows
themselves are tile space where there is one sequence, or the caller promises that they are aligned so.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.arrays import round_up
from pallas_kernels.attention.online_softmax_sm90 import ROWS
from pallas_kernels.attention.tiles import most_tiles, tiles
from pallas_kernels.compat import pl

WIDEST = 128
"""Above this head_dim a tile is one chunk, whose columns two warpgroups share; else two, a warpgroup each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryTiles:
    """Tiles in ascending order of sequence and query; surplus ones have no keys and no queries."""

    sequence: Int[Array, " n"]
    place: Int[Array, " n"]
    """Where it begins in tile space, in chunks."""
    position: Int[Array, " n"]
    """Position of its first query in the sequence."""
    keys: Int[Array, " n"]
    """Keys of the sequence; 0 in a surplus tile."""
    queries: Int[Array, " n"]
    """Queries of the sequence from the tile's first on, of which the tile has the first ones; 0 or less if surplus."""
    begin: Int[Array, " S"]
    """Where each sequence begins in tile space, in chunks."""
    rows: Int[Array, " size"] | None
    """Row of each place in tile space, the number of rows where there is none; None if the rows are tile space."""
    where: Int[Array, " T"] | None
    """Place of each row in tile space, its size for a row of no sequence; None likewise."""
    tile: int = dataclasses.field(metadata={"static": True})
    """Queries of a tile."""

    @property
    def shape(self):
        """What a kernel is compiled for: (queries of a tile, tiles, sequences, whether the rows are tile space)."""
        return self.tile, len(self.sequence), len(self.begin), self.rows is None


def query_tiles(query_start, seq_lens, tokens: int, head_dim: int, alignment: int = 1) -> QueryTiles:
    """The tiles of `tokens` rows; every sequence begins at a multiple of `alignment`, see `op.attention`."""
    sequences, tile = seq_lens.shape[0], ROWS if head_dim > WIDEST else 2 * ROWS
    lengths = query_start[1:] - query_start[:-1]
    if sequences == 1 or alignment % ROWS == 0:
        begin, rows, where = query_start[:-1] // ROWS, None, None
        alignment = ROWS
    else:
        filled = -(-lengths // ROWS)
        ends = jnp.cumsum(filled).astype(jnp.int32)
        begin = ends - filled
        chunks = -(-tokens // ROWS) + sequences - 1
        chunk = jnp.arange(chunks, dtype=jnp.int32)
        owner = jnp.minimum(jnp.sum(chunk[:, None] >= ends, axis=1, dtype=jnp.int32), sequences - 1)
        at = (chunk - begin[owner])[:, None] * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        rows = jnp.where(at < lengths[owner, None], query_start[owner, None] + at, tokens).reshape(-1)
        at = jnp.arange(tokens, dtype=jnp.int32)
        owner = jnp.sum(at[:, None] >= query_start[1:], axis=1, dtype=jnp.int32)
        place = (begin * ROWS - query_start[:-1])[jnp.minimum(owner, sequences - 1)] + at
        where = jnp.where(owner < sequences, place, chunks * ROWS)
    sequence, start = tiles(query_start, tile, most_tiles(tokens, tile, sequences, alignment))
    queries = lengths[sequence] - start
    return QueryTiles(
        sequence,
        begin[sequence] + start // ROWS,
        (seq_lens - lengths)[sequence] + start,
        jnp.where(queries > 0, seq_lens[sequence], 0),
        queries,
        begin,
        rows,
        where,
        tile,
    )


def to_tiles(x: Float[Array, "T H D"], tiles: QueryTiles) -> Float[Array, "size H D"]:
    """Rows in tile space; zeros past the last row."""
    if tiles.rows is not None:
        return x.at[tiles.rows].get(mode="fill", fill_value=0)
    surplus = round_up(x.shape[0], ROWS) - x.shape[0]
    return jnp.pad(x, ((0, surplus), (0, 0), (0, 0))) if surplus else x


def to_rows(x: Float[Array, "size H D"], tiles: QueryTiles, tokens: int) -> Float[Array, "T H D"]:
    """The inverse of `to_tiles`; zeros in rows of no sequence, if the rows are not tile space."""
    if tiles.where is not None:
        return x.at[tiles.where].get(mode="fill", fill_value=0)
    return x[:tokens] if x.shape[0] != tokens else x


def chunk_of(place, queries, part, size: int, surplus):
    """Inside a kernel, of chunk `part` of a tile: (its rows in tile space, its queries, whether it is there to write).

    A tile that its sequence doesn't fill reaches into the next sequence, or past the end of tile space.

    Args:
        place, queries: the tile's.
        size: rows of tile space.
        surplus: whether what follows the sequence is no sequence's, and to be written too.
    """
    number, queries = place + part, queries - part * ROWS
    rows = pl.ds(jnp.minimum(number, size // ROWS - 1) * ROWS, ROWS)
    return rows, queries, (queries > 0) | (surplus & (number < size // ROWS))
