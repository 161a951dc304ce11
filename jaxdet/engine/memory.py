"""How many pages of KV cache fit beside the weights and what a step needs; what to do where something doesn't."""

import contextlib
from collections.abc import Iterator

import jax

from jaxdet.engine.buckets import Buckets
from jaxdet.models.config import ModelConfig
from pallas_kernels.attention.decode_sm90 import part_bytes
from pallas_kernels.numerics import PAGE_SIZE

SIGNIFICANT_BITS = 7
"""Of a number of pages that memory limits: at most a 64th is given up."""
CPU_CACHE_BYTES = 2**30
"""Size limit of the cache where the device doesn't tell its memory."""


def page_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one page of keys and values, all layers."""
    return 2 * config.num_layers * config.num_kv_heads * PAGE_SIZE * config.head_dim * itemsize


def step_bytes(config: ModelConfig, buckets: Buckets, itemsize: int, table: int, backend: str) -> int:
    """Bytes of activations of the largest step: what is alive at once of a layer's, and the logits twice.

    Args:
        table: pages of one sequence at its longest, of which Hopper's decode attention keeps partial results.
    """
    c = config
    parts = 0
    if backend == "mosaic_gpu":
        parts = buckets.rows[-1] * part_bytes(c.num_q_heads, c.num_kv_heads, c.head_dim, table * PAGE_SIZE)
    steps = buckets.all()
    tokens, logits = max(b.rows + b.tokens for b in steps), max(b.sampled for b in steps)
    qkv = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    if backend == "xla":
        itemsize = 4  # its products leave their sums in memory before they are rounded
    layer = 3 * c.hidden_size + max(qkv + 2 * c.num_q_heads * c.head_dim, 3 * c.intermediate_size)
    return parts + tokens * layer * itemsize + 2 * logits * c.vocab_size * 4


def plan_pages(
    config: ModelConfig,
    buckets: Buckets,
    itemsize: int,
    backend: str,
    *,
    table: int,
    wanted: int,
    utilization: float,
) -> int:
    """Pages of the cache, the trash page included: `wanted` at most, and what the memory holds.

    Args:
        table: pages of one sequence at its longest.
        wanted: pages that could ever be in use.
        utilization: share of the device's memory that weights, cache and steps may take together.

    Raises:
        ValueError: not even one sequence fits.
    """
    memory = jax.local_devices()[0].memory_stats() or {}
    budget = CPU_CACHE_BYTES
    if "bytes_limit" in memory:
        budget = int(utilization * memory["bytes_limit"]) - memory["bytes_in_use"]
        budget -= step_bytes(config, buckets, itemsize, table, backend)
    pages = min(wanted, budget // page_bytes(config, itemsize) - 1)
    if pages < table and "bytes_limit" in memory:
        raise ValueError(
            f"the KV cache has room for {max(pages, 0) * PAGE_SIZE} tokens beside the weights, fewer than one "
            f"sequence's {table * PAGE_SIZE}; lower max_model_len, max_num_seqs or max_num_batched_tokens, or raise "
            f"gpu_memory_utilization={utilization}"
        )
    if pages < wanted:
        # Programs know the number of pages. The memory that is free differs from start to start; found programs don't.
        pages -= pages % (1 << max(0, pages.bit_length() - SIGNIFICANT_BITS))
    return max(table, pages) + 1


@contextlib.contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Raises MemoryError(message) where the device has no memory left: what doesn't fit, and what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(message) from None
