"""The Hopper kernels' tiles. What several CTAs read counts once: the L2 cache serves the others."""

import dataclasses

import jax.numpy as jnp

from jaxdet.models.config import ModelConfig
from jaxdet.roofline import needed
from jaxdet.roofline.kernel import Dots, Kernel
from jaxdet.roofline.needed import draw, rms_norm, rope_cache, sample, token_logprobs
from pallas_kernels.attention.decode_sm90 import CHUNK
from pallas_kernels.attention.online_softmax_sm90 import ROWS
from pallas_kernels.attention.segments_sm90 import BLOCK
from pallas_kernels.matmul.mosaic_gpu_sm90 import COLUMN_ALIGN, K_BLOCK, column_unit, parts_of
from pallas_kernels.matmul.tuning_sm90 import tile as tuned_tile

__all__ = ["decode", "draw", "matmul", "prefill", "rms_norm", "rope_cache", "sample", "token_logprobs"]


def matmul(name, rows, k, n, dtype, *, halves=1, residual=False, out_size=None) -> Kernel:
    """The tile in the table of this process's GPU, elsewhere an H200's; gate and up are columns of one matrix."""
    ideal = needed.matmul(name, rows, k, n, dtype, halves=halves, residual=residual, out_size=out_size)
    columns, depth = _up(halves * n, COLUMN_ALIGN), _up(k, K_BLOCK)
    tile = tuned_tile(rows, k, columns, column_unit(gated=halves == 2))
    row_tiles, width = -(-rows // tile.rows), min(tile.columns, columns)
    parts = parts_of(row_tiles, columns, dataclasses.replace(tile, columns=width))
    padding = depth * columns - halves * k * n
    return Kernel(
        name=name,
        bytes=ideal.bytes + padding * jnp.dtype(dtype).itemsize,
        flops=ideal.flops,
        dots=tuple(Dots(row_tiles * part.count, tile.rows, depth, part.width) for part in parts),
        blocks=f"{tile.rows} × {width} × {tile.depth}",
    )


def decode(config: ModelConfig, rows: int, context: int, window: int | None, dtype) -> Kernel:
    """The query heads of a KV head are a tile's rows."""
    seen = needed.keys_seen(context - 1, window)
    ideal = needed.decode(config, rows, _up(seen, CHUNK), None, dtype)
    blocks = rows * config.num_kv_heads * -(-seen // _block(config))
    flops = needed.decode(config, rows, context, window, dtype).flops
    return _attention(config, ideal.bytes, flops, blocks)


def prefill(config: ModelConfig, tokens: int, window: int | None, dtype) -> Kernel:
    """Every 64 rows of a head meet the blocks that they see."""
    ideal, keys = needed.prefill(config, tokens, window, dtype), _block(config)
    blocks = 0
    for first in range(0, tokens, ROWS):
        begin = 0 if window is None else max(first - window + 1, 0) // keys
        blocks += -(-min(first + ROWS, tokens) // keys) - begin
    return _attention(config, ideal.bytes, ideal.flops, blocks * config.num_q_heads)


def _attention(config: ModelConfig, moved: int, flops: int, blocks: int) -> Kernel:
    dim, keys = config.head_dim, _block(config)
    return Kernel(
        name="attention",
        bytes=moved,
        flops=flops,
        dots=(Dots(blocks, ROWS, dim, keys), Dots(blocks, ROWS, keys, dim)),
        vector=blocks * ROWS * (needed.SCORE_OPS * keys + needed.OUT_OPS * dim),
        blocks=f"{ROWS} rows × {keys} keys",
    )


def _block(config: ModelConfig) -> int:
    if config.head_dim not in BLOCK:
        raise ValueError(
            f"head_dim={config.head_dim}: the Hopper kernels take {', '.join(map(str, BLOCK))}; other models run on "
            "backend='xla'"
        )
    return BLOCK[config.head_dim]


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
