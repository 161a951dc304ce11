"""Sampling on Hopper: XLA's program, since there is no kernel of its own yet.

It is invariant there too: noise is integer arithmetic, counts are integers, sums are elementwise additions in
a pinned order, the rest is elementwise.
"""

from pallas_kernels.sample.xla import sample, token_logprobs

__all__ = ["sample", "token_logprobs"]
