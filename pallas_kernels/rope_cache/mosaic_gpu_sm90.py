"""Query/key norm, RoPE and cache write on Hopper: XLA's program, since there is no kernel of its own yet.

It is invariant there too: its row sums are elementwise additions in a pinned order, its other arithmetic is
elementwise with every product rounded before its sum.
"""

from pallas_kernels.rope_cache.xla import rope_cache

__all__ = ["rope_cache"]
