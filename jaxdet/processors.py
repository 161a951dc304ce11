"""What this process may use of the machine."""

import os
import sys


def usable_cpus() -> int:
    """CPU cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
