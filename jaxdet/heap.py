"""Keeps freed tensors from staying in the process."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_ONCE = 2**20
LARGEST_THRESHOLD = 2**25
"""Where glibc's own adjustment ends on 64-bit systems; it trims at twice that."""


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Blocks of 1 MB and more go back to the system when they are freed, while a checkpoint is read.

    glibc raises the size from which it does so to that of the largest block freed; tensors then stay in the heaps
    of whichever threads read them, 100 MB and more beside the parameters. Afterwards the size is where glibc would
    have raised it to. Other C libraries do as they do.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, AT_ONCE)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
