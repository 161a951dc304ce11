"""The TPU kernels' blocks: what they fetch, and the dots that the matrix unit sees."""

import jax.numpy as jnp

from jaxdet.models.config import ModelConfig
from jaxdet.roofline import needed
from jaxdet.roofline.kernel import Dots, Kernel
from pallas_kernels.arrays import round_up
from pallas_kernels.attention.mosaic_tpu import MOST_ROWS, MOST_SUB_TILES
from pallas_kernels.attention.segment_tpu import ROWS_MULTIPLE, sub_tile
from pallas_kernels.matmul.mosaic_tpu import COLUMN_TILE, COLUMN_TILES, ROW_TILE, ROW_TILES, block_k
from pallas_kernels.numerics import PAGE_SIZE, WIDE_REDUCE_LANES
from pallas_kernels.rms_norm.mosaic_tpu import BLOCK, TILE
from pallas_kernels.rope_cache.mosaic_tpu import group_keys, tile_tokens
from pallas_kernels.sample.mosaic_tpu import ROWS as SAMPLE_ROWS
from pallas_kernels.tiles_tpu import LANES

HALVINGS = 32
"""Of the ordered keys, until the edge of top-k or top-p is found; each is a sweep of the row."""
ABOVE_OPS, TIED_OPS, KEEP_OPS, WEIGH_OPS, TIE_OPS = 3, 6, 7, 3, 5
"""Elementwise operations of sweeps: what lies above an edge is summed, what is tied with it and has a low id counted,
the rest dropped; a logit becomes a mass that is summed; the mass at the edge is looked up."""
PUT_OPS = 4
"""Elementwise operations that put one token into a group of keys: an element is widened, rotated, chosen, rounded."""


def passes(dtype) -> int:
    """Products of bfloat16 that make one of `dtype` (precision HIGHEST)."""
    return 6 if jnp.dtype(dtype) == jnp.float32 else 1


def matmul_blocks(
    rows: int, k: int, n: int, dtype, halves: int = 1
) -> tuple[tuple[int, ...], tuple[int, int], int]:
    """(grid, rows and columns of a block, columns of a dot)."""
    columns = round_up(n, LANES)
    column_tile = min(COLUMN_TILE // halves, columns)
    block = ROW_TILE, column_tile
    if rows > ROW_TILE:
        tiles = min(ROW_TILES, _cdiv(rows, ROW_TILE)), min(COLUMN_TILES, _cdiv(columns, column_tile))
        block = tiles[0] * ROW_TILE, tiles[1] * column_tile
    return (_cdiv(rows, block[0]), _cdiv(columns, block[1]), _cdiv(k, block_k(k, dtype))), block, column_tile


def matmul(name, rows, k, n, dtype, *, halves=1, residual=False, out_size=None) -> Kernel:
    """A block is fetched again whenever its place in the grid changes; k is the fastest axis, rows are the slowest."""
    (row_blocks, column_blocks, k_blocks), block, column_tile = matmul_blocks(rows, k, n, dtype, halves)
    step, size = block_k(k, dtype), jnp.dtype(dtype).itemsize
    weights = halves * round_up(n, LANES) * k_blocks * step
    x_reads = column_blocks if rows > ROW_TILE and k_blocks > 1 else 1
    weight_reads = row_blocks if column_blocks * k_blocks > 1 else 1
    tiles = row_blocks * (block[0] // ROW_TILE) * column_blocks * (block[1] // column_tile)
    ideal = needed.matmul(name, rows, k, n, dtype, halves=halves)
    return Kernel(
        name=name,
        bytes=(x_reads * rows * k + weight_reads * weights + (rows * n if residual else 0)) * size
        + rows * n * (out_size or size),
        flops=ideal.flops,
        dots=(Dots(tiles * k_blocks * halves * passes(dtype), ROW_TILE, step, column_tile),),
        vector=tiles * (k_blocks + 2) * halves * ROW_TILE * column_tile,
        blocks=f"{block[0]} × {halves * block[1]} × {step}, dots {ROW_TILE} × {column_tile}",
    )


def prefill_tile(config: ModelConfig, tokens: int) -> tuple[int, int, int]:
    """(sub-tiles that share a page, tokens of a sub-tile, rows of its dots)."""
    queries, rows = sub_tile(config.num_q_heads // config.num_kv_heads)
    most = MOST_ROWS // (config.num_kv_heads * rows)
    return max(1, min(MOST_SUB_TILES, most, _cdiv(tokens, queries))), queries, rows


def decode(config: ModelConfig, rows: int, context: int, window: int | None, dtype) -> Kernel:
    """One sub-tile with one query a sequence."""
    pages = _pages(context - 1, context - 1, window)
    ideal = needed.decode(config, rows, context, window, dtype)
    return _attention(config, ideal, dtype, fetched=rows * pages, met=rows * pages, tiles=rows, queries=1)


def prefill(config: ModelConfig, tokens: int, window: int | None, dtype) -> Kernel:
    """Tiles of several sub-tiles, each of which meets the pages that it sees of those that are fetched."""
    subs, queries, _ = prefill_tile(config, tokens)
    size = subs * queries

    def pages(tile: int) -> int:
        return sum(_pages(first, min(first + tile, tokens) - 1, window) for first in range(0, tokens, tile))

    return _attention(
        config,
        needed.prefill(config, tokens, window, dtype),
        dtype,
        fetched=pages(size),
        met=pages(queries),
        tiles=_cdiv(tokens, size) * subs,
        queries=queries,
    )


def _pages(first: int, last: int, window: int | None) -> int:
    """Pages that hold a key which a query at positions `first` to `last` sees."""
    begin = 0 if window is None else max(first - window + 1, 0) // PAGE_SIZE
    return last // PAGE_SIZE + 1 - begin


def _attention(config: ModelConfig, ideal: Kernel, dtype, *, fetched, met, tiles, queries) -> Kernel:
    """`tiles` sub-tiles of `queries` tokens; `fetched` pages, and `met` pairs of a page and a sub-tile."""
    c, size = config, jnp.dtype(dtype).itemsize
    group = c.num_q_heads // c.num_kv_heads
    rows = sub_tile(group)[1]
    filled = round_up(queries * group, ROWS_MULTIPLE)
    pairs = met * c.num_kv_heads
    # A prompt's queries are moved into tiles by XLA, and its outputs back: each is read and written twice more.
    moves = 2 if queries == 1 else 6
    return Kernel(
        name="attention",
        bytes=(2 * fetched * PAGE_SIZE + moves * tiles * filled) * c.num_kv_heads * c.head_dim * size,
        flops=ideal.flops,
        dots=(
            Dots(pairs * passes(dtype), rows, c.head_dim, PAGE_SIZE),
            Dots(pairs * passes(dtype), rows, PAGE_SIZE, c.head_dim),
        ),
        vector=pairs * rows * (needed.SCORE_OPS * PAGE_SIZE + needed.OUT_OPS * c.head_dim),
        blocks=f"{rows} rows ({queries} tokens × {group} heads) × {PAGE_SIZE} keys",
        one_core=True,
    )


def rms_norm(rows: int, width: int, dtype) -> Kernel:
    """Tiles of 16 rows."""
    ideal = needed.rms_norm(rows, width, dtype)
    padded = round_up(rows, TILE)
    return Kernel(
        name=ideal.name,
        bytes=ideal.bytes,
        vector=needed.NORM_OPS * padded * width,
        blocks=f"{min(BLOCK, padded)} × {width}, {TILE} at once",
    )


def rope_cache(config: ModelConfig, tokens: int, dtype, *, scattered: bool) -> Kernel:
    """Whole groups of keys are read and written; `scattered` tokens have one each, a prompt's share them."""
    c, size = config, jnp.dtype(dtype).itemsize
    keys = group_keys(PAGE_SIZE, c.head_dim, dtype)
    tile = tile_tokens(c.num_kv_heads, PAGE_SIZE, c.head_dim, dtype)
    groups = tokens if scattered else _cdiv(tokens, tile) * _cdiv(tile, keys)
    width = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    group = c.num_kv_heads * keys * c.head_dim
    computed = round_up(tokens, tile)
    return Kernel(
        name="rope_cache",
        # Keys and values are read and written; the angles are gathered by XLA first, which writes and reads them again.
        bytes=4 * groups * group * size
        + tokens * ((width + c.num_q_heads * c.head_dim) * size + 3 * 4 * c.head_dim),
        vector=needed.ROPE_OPS * computed * width + 2 * PUT_OPS * tokens * group,
        blocks=f"{tile} tokens, groups of {keys} keys",
        one_core=True,
    )


def sample(rows: int, vocab: int) -> Kernel:
    """Eight rows at a time, whole."""
    ideal = needed.sample(rows, vocab)
    width = round_up(vocab, WIDE_REDUCE_LANES)
    return Kernel(
        name=ideal.name,
        bytes=ideal.bytes,
        vector=needed.SAMPLE_OPS * round_up(rows, SAMPLE_ROWS) * width,
        blocks=f"{SAMPLE_ROWS} × {width}",
    )


def draw(rows: int, vocab: int) -> Kernel:
    """Rows with top-k and top-p: sweeps of blocks that stay in vector memory."""
    ideal, greedy = needed.draw(rows, vocab), sample(rows, vocab)
    padded, width = round_up(rows, SAMPLE_ROWS), round_up(vocab, WIDE_REDUCE_LANES)
    edge = ABOVE_OPS * (HALVINGS + 1) + TIED_OPS * width.bit_length() + KEEP_OPS
    sweeps = needed.SCALE_OPS + 2 * edge + WEIGH_OPS + TIE_OPS + needed.NOISE_OPS
    return Kernel(
        name=ideal.name,
        bytes=ideal.bytes + _columns(padded, 3),  # parameters, keys, results
        vector=greedy.vector + sweeps * padded * width,
        blocks=greedy.blocks,
    )


def token_logprobs(rows: int, vocab: int) -> list[Kernel]:
    """Eight rows at a time, whole; the most likely tokens are XLA's, which gets a copy with +0 in the place of −0."""
    (ideal,) = needed.token_logprobs(rows, vocab)
    padded, width = round_up(rows, SAMPLE_ROWS), round_up(vocab, WIDE_REDUCE_LANES)
    own = Kernel(
        name=ideal.name,
        bytes=ideal.bytes + _columns(padded, 3),  # logits of the tokens, their ids, results
        vector=(needed.SAMPLE_OPS + needed.LOGPROB_OPS) * padded * width,
        blocks=f"{SAMPLE_ROWS} × {width}",
    )
    return [own, Kernel(name="top logprobs", bytes=3 * 4 * rows * vocab)]


def _columns(rows: int, count: int) -> int:
    """Bytes of values that each row has one of, in arrays of whole lanes; written once and read once."""
    return 2 * 4 * count * rows * LANES


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
