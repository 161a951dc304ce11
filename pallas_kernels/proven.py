"""Larger tiles of the xla backend, as far as they are proven to give the bits of the base ones on this device.

Whoever proves them (`jaxdet.engine.larger_tiles`) hands them to the programs that may use them, by `with_tiles`. They
are part of what JAX knows a traced function by, so programs with different tiles never share a trace.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

ROWS = (128, 256, 512, 1024, 2048)
"""Rows that a dot may have where a device is proven to give them the bits of `backend.row_tile` rows."""
ATTENTION_TILE, ATTENTION_GROUP = 128, 4
"""Queries of a prompt's tile, and tiles that go through a dot together, where they are proven."""


class Dot(NamedTuple):
    """[rows, k] · [k, n], both of one dtype."""

    k: int
    n: int
    dtype: str
    rows: int


class Attention(NamedTuple):
    """What a prompt's attention is, besides its sequences."""

    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    window: int | None
    soft_cap: float | None


class Tiles(NamedTuple):
    """What may be used beside the base tiles; nothing else may."""

    dots: tuple[Dot, ...] = ()
    attention: tuple[Attention, ...] = ()


BASE = Tiles()
_context = jax.make_user_context(BASE)


def with_tiles[F: Callable[..., Any]](tiles: Tiles, function: F) -> F:
    """`function`, which may use `tiles` wherever it is traced."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _context(tiles):
            return function(*args, **kwargs)

    named = function
    while isinstance(named, functools.partial):
        named = named.func
    wrapped.__name__ = named.__name__  # programs are called by it
    return wrapped  # type: ignore[return-value]


def larger_rows(k: int, n: int, dtype) -> list[int]:
    """Rows that such a dot may have beside the base tile's, most first."""
    shape = k, n, str(dtype)
    return sorted((dot.rows for dot in _context.value.dots if dot[:3] == shape), reverse=True)


def attention_is_larger(shape: Attention) -> bool:
    """Whether a prompt's attention may go in tiles of ATTENTION_TILE queries."""
    return shape in _context.value.attention
