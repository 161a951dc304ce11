"""Every constant that fixes an order of floating-point operations.

Changing any of them changes bits: bump `NUMERICS_VERSION` in the same commit and refresh the golden digests.
What may vary freely with the shape (row tiles, warps, stages) lives in each op's tuning module instead.
"""

NUMERICS_VERSION = 1
"""Version of the bits. Two builds with the same version, weights, dtype and backend family agree bit for bit."""

K_CHUNK = 768
"""xla matmul: K is cut into ceil(K / K_CHUNK) equal chunks; each is summed in ascending k, chunks ascending."""

COLUMN_BLOCK = 64
"""xla matmul: output columns of one packed weight block."""

ROW_TILE = 8
"""xla backend on CPUs without proven row freedom: every dot has exactly this many rows."""

GPU_ROW_TILES = {2: 128, 4: 32}
"""The same on GPUs, by bytes of an element: as many rows as a read of the weights pays for, so that decode is no
slower for them and a prompt reads its weights seldom. float32 has no matrix units, hence fewer. More where a device has
proven them free: `proven.ROWS`."""

GPU_ATTENTION_TILES = 16
"""xla attention on GPUs: so many query tiles go through a dot together, always."""

REDUCE_LANES = 64
"""Row sums: element i goes to lane i % REDUCE_LANES, lanes add up ascending, then halve pairwise."""

WIDE_REDUCE_LANES = 1024
"""The same for rows longer than `WIDE_REDUCE_FROM` (vocabularies)."""

WIDE_REDUCE_FROM = 8192
"""Row length above which a row sum uses `WIDE_REDUCE_LANES`."""

PAGE_SIZE = 128
"""Keys in one page of the KV cache."""

XLA_SEGMENT = PAGE_SIZE
"""xla attention: keys in one segment; segments merge in ascending order."""

TRASH_PAGE = 0
"""The KV page that padding tokens write to; no sequence ever reads it."""

GRADIENT_ROWS = 64
"""Rows (tokens) of one partial sum of a weight's gradient; examples in training begin at multiples of it."""
