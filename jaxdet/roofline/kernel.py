"""One kernel's work: what it moves, what it multiplies, what else it computes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Dots:
    """`count` products [rows, k] × [k, n], as the kernel hands them to the matrix unit."""

    count: int
    rows: int
    k: int
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel of a step, each figure for one call."""

    name: str
    bytes: int
    """Between HBM and the chip, blocks that are fetched again included."""
    flops: int = 0
    """Of the products that the result needs, nothing padded."""
    dots: tuple[Dots, ...] = ()
    vector: int = 0
    """Elementwise operations, counted in the kernel's source; an exponential counts as one."""
    blocks: str = ""
    """The shapes that the work is cut into."""
    calls: int = 1
    """In one step."""
    one_core: bool = False
    """Whether it leaves the second core of a device that joins two idle."""
