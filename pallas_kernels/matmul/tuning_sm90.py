"""Tile shapes of the Hopper matmul, by GPU. They never touch a bit: every entry accumulates k in ascending order."""

import dataclasses
import json
import math
import pathlib

import jax

from pallas_kernels.arrays import round_up


@dataclasses.dataclass(frozen=True)
class Tile:
    """One configuration: what a CTA computes and how it is fed."""

    rows: int
    """Rows of the result per CTA, a multiple of 64 · row_groups."""
    columns: int
    """Columns per CTA (gate and up columns together in a gated product)."""
    depth: int = 64
    """k per pipeline stage: 64, 128 or 256."""
    row_groups: int = 1
    """Consumer warpgroups, each with rows / row_groups rows."""
    band: int = 16
    """Row tiles, or clusters of them, that go through all columns together, so that what they read stays in L2."""
    tail: int = 0
    """Columns per CTA of what fills no whole round of the SMs, fewer than `columns`; 0: as in the rounds."""
    stages: int = 0
    """Pipeline stages at most, two or more, where more in flight than memory needs slows it down; 0: no such limit."""
    cluster: int = 1
    """CTAs, a row tile each, of which each loads its part of the weights for all; 2 or 3 where L2 is the limit.

    Where row tiles or weights can't be shared out evenly (an odd number of row tiles, say) each loads its own.
    """


ROW_BUCKETS = (8, 64, 128, 192, 256, 512, 1024, 2048, 8192)
"""A row count uses the first bucket that holds it; more rows use the last."""

DEFAULT = {
    8: Tile(64, 64),
    64: Tile(64, 64),
    128: Tile(64, 128),
    192: Tile(64, 128),
    256: Tile(128, 128, row_groups=2),
    512: Tile(128, 128, row_groups=2),
    1024: Tile(128, 256, row_groups=2),
    2048: Tile(128, 256, row_groups=2),
    8192: Tile(128, 256, row_groups=2),
}
"""For shapes that the table lacks."""

Table = dict[str, dict[str, list[int]]]
""""{K}x{columns}" -> row bucket -> the fields of a Tile, as measured by benchmarks/tune_matmul.py."""


def _family(device_kind: str) -> str:
    """What GPUs with one table have in common: NVIDIA H100 of NVIDIA H100 80GB HBM3."""
    return " ".join(device_kind.split()[:2])


_RECORDS = [
    json.loads(path.read_text()) for path in sorted(pathlib.Path(__file__).parent.glob("tiles_*.json"))
]
TABLES: dict[str, Table] = {_family(record["device"]): record["tiles"] for record in _RECORDS}
_OTHERS = "NVIDIA H200"
_assumed: str | None = None


def assume(device_kind: str | None) -> None:
    """Tiles for that GPU from now on: in a process that lowers for one and has none. None: for its own."""
    global _assumed
    _assumed = device_kind


def table() -> Table:
    """This process's GPU's; an H200's for a GPU without one of its own."""
    return TABLES.get(_family(_assumed or jax.devices()[0].device_kind), TABLES[_OTHERS])


def bucket(rows: int) -> int:
    """The row bucket of `rows`."""
    return next((b for b in ROW_BUCKETS if rows <= b), ROW_BUCKETS[-1])


def whole_rows(rows: int) -> int:
    """The least number of rows, at least `rows`, that fills whole tiles of every matrix: x needs no padded copy."""
    if rows <= ROW_BUCKETS[1]:  # one tile holds them
        return rows
    at = str(bucket(rows))
    heights = {DEFAULT[int(at)].rows, *(entries[at][0] for entries in table().values() if at in entries)}
    return round_up(rows, math.lcm(*heights))


def tile(rows: int, k: int, columns: int, unit: int) -> Tile:
    """The configuration for [rows, k] × [k, columns], columns as packed.

    Args:
        unit: what the tile's columns are a multiple of; a gated product's is larger than that of another model's matrix
            of the same shape, for which the entry may be.
    """
    at = bucket(rows)
    entry = table().get(f"{k}x{columns}", {}).get(str(at))
    found = Tile(*entry) if entry else DEFAULT[at]
    return dataclasses.replace(found, columns=round_up(found.columns, unit))
