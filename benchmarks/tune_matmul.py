"""Measures tiles of the Hopper matmul and writes its table; needs a Hopper GPU.

    python benchmarks/tune_matmul.py OUT [--models Qwen3-8B ...] [--rows 256 64 ...] [--seconds 500]

For each matrix of the models and each bucket of rows the candidates that fit run twice, weights rotated so that L2
cannot hold them: for milliseconds at the card's full clock, by the kernels' own times, and for some tenths of a second
without a pause, where a card that an engine keeps busy lowers its clock to stay within its power. The tile with the
least geometric mean of both goes to OUT/tiles.json, this GPU's table; points that were not reached keep their
entries. With --dot `jnp.dot` runs among them at the power limit. All candidates of a point must give one bit pattern,
before they are timed and after, or it fails. OUT/tuning.jsonl has every figure.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from kernels import SHAPES, cupti_times, normal, points_of, weight_copies

from jaxdet.engine.lowered_cache import exported_of
from pallas_kernels.arrays import round_up
from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import DEFAULT, ROW_BUCKETS, Tile, table, tile


class Point(NamedTuple):
    """A product to tune: [rows, k] × [k, columns as packed]."""

    rows: int
    k: int
    columns: int
    gated: bool
    residual: bool

    @property
    def out_dtype(self):
        return jnp.float32 if self.columns > 2**16 else jnp.bfloat16

    @property
    def packed(self):
        shape = self.k // matmul.K_BLOCK, self.columns, matmul.K_BLOCK
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    @property
    def unit(self) -> int:
        """What the columns of a tile are a multiple of."""
        return matmul.column_unit(gated=self.gated)

    @property
    def tuned(self) -> Tile:
        return tile(self.rows, self.k, self.columns, self.unit)

    @property
    def flops(self) -> float:
        return 2 * self.rows * self.k * self.columns


class Measured(NamedTuple):
    """Microseconds of a tile at the power limit and at the card's full clock."""

    tile: Tile
    busy: float
    short: float

    @property
    def score(self) -> float:
        return math.sqrt(self.busy * self.short)


CANDIDATES = {1: 8, 2: 4, 3: 3}
"""By CTAs in a cluster."""
PROGRAM_US = 4000
"""A program is about so long."""
START, WARM, MEASURED = 0.2, 0.05, 0.07
"""Seconds; a card that was idle is at its power limit only after the first."""
WEIGHTS_IN_FLIGHT = 96 * 1024
"""Bytes of weights on their way into an SM that few rows may do best with; more keep memory's banks less in order."""
NOISE = 0.01
"""A tile that isn't faster by more leaves the table as it is."""
PROCESSES = 12
SHAPES_OF_CTAS = (64, 1), (128, 1), (128, 2), (192, 3), (256, 2)
"""(rows, consumer warpgroups)."""
MOST_SUMS = {1: 128 * 192, 2: 128 * 192, 3: 64 * 192}
"""That fit the registers of each of so many warpgroups."""


def widths(point: Point, row_tiles: int, cluster: int) -> set[int]:
    """Columns a tile: the usual ones, and the least with which all tiles are in one to four rounds of the SMs."""
    found = {16, 32, 48, 64, 96, 128, 144, 160, 192, 256}
    unit = math.lcm(point.unit, 8 * cluster)
    for rounds in range(1, 5):
        if side_by_side := matmul.clusters_at_once(cluster) * rounds * cluster // row_tiles:
            found.add(round_up(math.ceil(point.columns / side_by_side), unit))
    return {width for width in found if 16 <= width <= 256 and width % unit == 0}


def candidates(point: Point) -> list[Tile]:
    """What is in the table, the tiles that keep the SMs busiest and load the least."""
    rows, columns = point.rows, point.columns
    ranked = {cluster: [] for cluster in CANDIDATES}
    for (height, groups), cluster in itertools.product(SHAPES_OF_CTAS, CANDIDATES):
        row_tiles = -(-rows // height)
        if (rows % height and rows > 64) or height > max(rows, 64) or row_tiles % cluster:
            continue
        for width in widths(point, row_tiles, cluster):
            if height // groups * width > MOST_SUMS[groups]:
                continue
            for tail in (0, 64) if width > 64 and cluster < 3 else (0,):
                parts = matmul.parts_of(row_tiles, columns, Tile(height, width, tail=tail))
                if tail and len(parts) == 1:
                    continue
                # What a round costs: products at the rate of one SM, loads of a tile's operands, a fixed start.
                work = sum(
                    math.ceil(row_tiles // cluster * part.count / matmul.clusters_at_once(cluster))
                    * (max(height * part.width / 128, 0.55 * (height + part.width)) + 6)
                    for part in parts
                )
                ranked[cluster].append((work, height, width, groups, tail))
    found = {point.tuned: None}
    best = [(c, *at) for c, most in CANDIDATES.items() for _, *at in sorted(ranked[c])[:most]]
    for cluster, height, width, groups, tail in best:
        for depth in (64, 128, 256):
            stages = matmul.stages_of(Tile(height, width), depth, residual=0, held=0, most=99)
            if depth > 64 and (stages < 4 or rows > 512 or cluster > 1 or tail):
                break  # deep stages cost fewer waits, and nothing else where there are four
            for band in (8, 16) if rows >= 2048 else (16,):
                found[Tile(height, width, depth, groups, band, tail, 0, cluster)] = None
            fewer = max(WEIGHTS_IN_FLIGHT // (width * depth * 2), 3)
            if rows <= 64 and fewer < stages - 1:
                found[Tile(height, width, depth, groups, 16, tail, fewer)] = None
    return list(found)


def operands(point: Point, struct: bool) -> tuple:
    make = (lambda seed, *shape, **_: jax.ShapeDtypeStruct(shape, jnp.bfloat16)) if struct else normal
    rows, k, columns, _, residual = point
    added = (make(8, rows, columns),) if residual else ()
    return make(9, rows, k), *added


def product(point: Point, chosen: Tile, x, *rest):
    *added, w = rest
    if point.gated:
        return matmul.gated_matmul(x, w, n=point.columns // 2, activation="silu", tile=chosen)
    residual = added[0] if added else None
    return matmul.matmul(x, w, n=point.columns, residual=residual, out_dtype=point.out_dtype, tile=chosen)


def lowered(point: Point, chosen: Tile) -> bytes:
    """One product as StableHLO. Python holds its lock for the second or two that this takes: for a process."""
    jitted = jax.jit(functools.partial(product, point, chosen))
    return bytes(exported_of(jitted, (*operands(point, struct=True), point.packed), "cuda").serialize())


def dot(point: Point, x, *rest):
    """What XLA makes of the same product, weights as [K, N]; a gate's halves side by side."""
    *added, w = rest
    y = jnp.dot(x, w, preferred_element_type=jnp.float32)
    if point.gated:
        gate, up = jnp.split(y, 2, axis=1)
        y = jax.nn.silu(gate) * up
    return (y + added[0] if added else y).astype(point.out_dtype)


def in_a_row(point: Point, call, arguments, weights):
    """A program that multiplies by each of `weights` in turn, again and again, and returns the last turn's products.

    A loop on the device, in which no address changes: the host has nothing to do meanwhile.
    """

    def body(_, carry):
        arguments, weights, products = carry
        y, products = products[-1], []
        for w in weights:
            arguments, y = lax.optimization_barrier((arguments, y))  # one after another, none of them twice
            products.append(call(*arguments, w))
            y = products[-1]
        return arguments, weights, products

    def many(arguments, weights):
        shape = point.rows, point.columns // (2 if point.gated else 1)
        products = [jnp.zeros(shape, point.out_dtype) for _ in weights]
        return lax.fori_loop(0, turns(point)[1], body, (arguments, weights, products))[2]

    return jax.jit(many).lower(arguments, weights).compile()


def short_us(run: Callable, products: int) -> float:
    """Microseconds a product by the kernels' own times, in a program of milliseconds: the card has its full clock."""
    times = [ms * 1e3 for name, ms in cupti_times(lambda: jax.block_until_ready(run())) if "matmul" in name]
    if len(times) != products:
        raise RuntimeError(f"{len(times)} kernels of {products} products")
    return float(np.median(times))


def sustained_us(run: Callable, products: int, seconds: float) -> float:
    """Microseconds a product while one follows another."""
    begin, count, waiting = time.perf_counter(), 0, []
    while time.perf_counter() - begin < seconds:
        waiting.append(run())
        count += 1
        if len(waiting) > 2:
            jax.block_until_ready(waiting.pop(0))
    jax.block_until_ready(waiting)
    return (time.perf_counter() - begin) / count / products * 1e6


def busy_us(run: Callable, products: int) -> float:
    """Microseconds a product at the power limit."""
    sustained_us(run, products, WARM)
    return sustained_us(run, products, MEASURED)


def in_turns(time_one: Callable, runs: dict, products: int) -> dict:
    """The mean time of each of `runs`, all of them in order and again in reverse: a card drifts."""
    first = {key: time_one(run, products) for key, run in runs.items()}
    return {key: (first[key] + time_one(runs[key], products)) / 2 for key in reversed(runs)}


def compiled(point: Point, lowering: concurrent.futures.Future):
    """The program of a candidate, once a process has lowered its product."""
    call = export.deserialize(bytearray(lowering.result())).call
    return in_a_row(point, call, operands(point, struct=True), [point.packed] * turns(point)[0])


def turns(point: Point) -> tuple[int, int]:
    """How many weights there are, and how often a program goes through them."""
    copies = weight_copies(point.k, point.columns)
    estimate = max(point.k * point.columns * 2 / 4.2e6, point.flops / 7e8)
    return copies, max(1, math.ceil(PROGRAM_US / (copies * estimate)))


def measure(point: Point, programs, with_dot: bool) -> tuple[list[Measured], float | None]:
    """Every candidate that compiled, best first, and the µs of `jnp.dot` at the power limit."""
    copies, again = turns(point)
    products, arguments = copies * again, operands(point, struct=False)
    plain = [normal(i, point.k, point.columns, scale=0.02) for i in range(copies)]
    pack = jax.jit(lambda w: matmul.pack_gated(*jnp.split(w, 2, axis=1)) if point.gated else matmul.pack(w))
    weights = [pack(w) for w in plain]
    runs = {}
    for chosen, program in programs.items():
        if program.exception():
            print(json.dumps({"tile": str(chosen), "failed": f"{program.exception()!r:.200}"}), flush=True)
        else:
            runs[chosen] = functools.partial(program.result(), arguments, weights)
    if not runs:
        raise RuntimeError(f"{point}: none of {len(programs)} tiles compiled")
    beside = {}
    if with_dot:
        program = in_a_row(point, functools.partial(dot, point), arguments, plain)
        beside = {"dot": functools.partial(program, arguments, plain)}
    first = next(iter(runs.values()))
    wanted = first()
    must_agree(point, runs, wanted)
    short_us(first, products)  # not counted: what comes first is slower
    short = in_turns(short_us, runs, products)
    sustained_us(first, products, START)
    busy = in_turns(busy_us, runs | beside, products)
    must_agree(point, runs, wanted)  # of a card at work, too
    times = [Measured(chosen, busy[chosen], short[chosen]) for chosen in runs]
    return sorted(times, key=lambda measured: measured.score), busy.get("dot")


def must_agree(point: Point, runs, wanted) -> None:
    """Raises AssertionError unless all of `runs` give the bits of `wanted`."""
    for chosen, run in runs.items():
        if count := sum(int(unlike(*pair)) for pair in zip(run(), wanted, strict=True)):
            raise AssertionError(f"{point}: {count} values of {chosen} unlike those of {next(iter(runs))}")


@jax.jit
def unlike(a, b):
    """How many bit patterns differ."""
    a, b = (jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) for x in (a, b))
    return jnp.sum(a != b)


def fields(chosen: Tile) -> list[int]:
    return list(dataclasses.astuple(chosen))


def as_json(record: dict) -> str:
    """A line for every entry of the table."""
    tables = []
    for shape, buckets in record["tiles"].items():
        entries = [f"   {json.dumps(rows)}: {json.dumps(tile)}" for rows, tile in buckets.items()]
        tables.append(f"  {json.dumps(shape)}: {{\n" + ",\n".join(entries) + "\n  }")
    head = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in record.items() if key != "tiles"]
    return "{\n" + "".join(head) + ' "tiles": {\n' + ",\n".join(tables) + "\n }\n}\n"


def points(models, rows) -> list[Point]:
    """Of shapes that two models have, one."""
    found = {}
    for bucket, model in itertools.product(rows, models):
        for _, name in points_of(model, [bucket]):
            k, n = SHAPES[model][name]
            found[Point(bucket, k, n, gated=name == "gate_up", residual=name in ("o", "down"))] = None
    return list(found)


def main(out: pathlib.Path, models, rows, seconds: float, with_dot: bool) -> None:
    assert jax.default_backend() == "gpu", "needs a Hopper GPU"
    begin = time.perf_counter()
    found = {
        shape: {rows: fields(Tile(*t)) for rows, t in buckets.items()} for shape, buckets in table().items()
    }
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "measured": time.strftime("%Y-%m-%d"),
        "tiles": found,
    }
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that lower
    spawn = multiprocessing.get_context("spawn")
    wanted = points(models, rows)
    with (
        concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=spawn) as processes,
        concurrent.futures.ThreadPoolExecutor(16) as threads,
    ):
        lowerings = {(p, c): processes.submit(lowered, p, c) for p in wanted for c in candidates(p)}
        programs = {key: threads.submit(compiled, key[0], job) for key, job in lowerings.items()}
        concurrent.futures.wait(programs.values())  # nothing else runs while something is timed
    print(f"{len(programs)} programs compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for point in wanted:
        if time.perf_counter() - begin > seconds:
            print("time is over; the points that are left keep their entries", flush=True)
            break
        times, beside = measure(point, {c: programs.pop((point, c)) for c in candidates(point)}, with_dot)
        best, old = times[0], point.tuned
        before = next((measured for measured in times if measured.tile == old), None)
        if before and before.score <= best.score * (1 + NOISE):
            best = before
        row = {
            "K": point.k,
            "columns": point.columns,
            "rows": point.rows,
            "us": round(best.busy, 2),
            "short us": round(best.short, 2),
            "TFLOP/s": round(point.flops / best.busy / 1e6),
            "dot us": beside and round(beside, 2),
            "table us": before and [round(before.busy, 2), round(before.short, 2)],
            "tiles": [(round(t.busy, 2), round(t.short, 2), fields(t.tile)) for t in times],
        }
        print(json.dumps(row | {"tiles": row["tiles"][:3]}), flush=True)
        with (out / "tuning.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        shape = f"{point.k}x{point.columns}"
        entries = found.get(shape, {}) | {str(point.rows): fields(best.tile)}
        if best.tile == DEFAULT[point.rows]:
            del entries[str(point.rows)]
        found[shape] = dict(sorted(entries.items(), key=lambda entry: int(entry[0])))
        (out / "tiles.json").write_text(as_json(record))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROW_BUCKETS), choices=ROW_BUCKETS)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--dot", action="store_true", help="time jnp.dot, too")
    options = parser.parse_args()
    main(options.out, options.models, options.rows, options.seconds, options.dot)
