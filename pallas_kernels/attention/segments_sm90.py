"""Where the key axis is cut on Hopper. These fix the order of sums: changing one changes bits."""

SEGMENT = 1024
"""Keys in one segment; segments begin at multiples of it."""

BLOCK = {64: 128, 96: 128, 128: 128, 256: 64}
"""head_dim → keys in one online-softmax block."""

MOST_GROUPED_HEADS = 64
"""Query heads of a KV head: the rows of one tile."""
