"""The script behind the tables of tiles: its candidates, and what it makes of measured programs, without a GPU."""

import concurrent.futures
import functools

import jax.numpy as jnp
import pytest
import tune_matmul as tuner

from pallas_kernels.matmul import mosaic_gpu_sm90 as matmul
from pallas_kernels.matmul.tuning_sm90 import ROW_BUCKETS, Tile

POINT = tuner.Point(128, 256, 512, gated=False, residual=True)
FAST, SLOW, LATE = Tile(64, 128), Tile(64, 64), Tile(64, 96, cluster=2)


@pytest.mark.parametrize("rows", ROW_BUCKETS)
def test_candidates_are_tiles_that_fit(rows):
    for point in tuner.points(list(tuner.SHAPES), [rows]):
        found = tuner.candidates(point)
        assert found[0] == point.tuned and len(set(found)) == len(found) > 3
        assert rows < 128 or any(tile.cluster > 1 for tile in found)
        for tile in found:
            row_tiles = -(-rows // tile.rows)
            parts = matmul.parts_of(row_tiles, point.columns, tile)
            blocks = tile.depth // matmul.K_BLOCK
            assert matmul.cluster_of(tile, row_tiles, parts, blocks) == tile.cluster
            assert tile.columns % point.unit == 0


@pytest.fixture
def programs(monkeypatch):
    """Products of XLA's, which a CPU runs, as those of tiles; their times at full clock are made up."""
    for name in ("START", "WARM", "MEASURED"):
        monkeypatch.setattr(tuner, name, 0.005)
    monkeypatch.setattr(tuner, "turns", lambda _: (2, 3))

    def product(added, x, residual, w):
        w = matmul.unpack(w, POINT.k, POINT.columns)
        return (jnp.dot(x, w, preferred_element_type=jnp.float32) + residual + added).astype(jnp.bfloat16)

    def short_us(run, _):
        run()
        return {FAST: 1.0, SLOW: 1e6, LATE: 1e3}[run.func.tile]

    class Program:
        def __init__(self, tile, added):
            self.tile = tile
            call = functools.partial(product, added)
            self.run = tuner.in_a_row(POINT, call, tuner.operands(POINT, struct=True), [POINT.packed] * 2)

        def __call__(self, *operands):
            return self.run(*operands)

    def future(tile, added=0.0):
        done = concurrent.futures.Future()
        done.set_result(Program(tile, added))
        return done

    monkeypatch.setattr(tuner, "short_us", short_us)
    return future


def test_the_best_comes_first_and_what_fails_is_named(programs, capsys):
    failed = concurrent.futures.Future()
    failed.set_exception(ValueError("no registers left"))
    candidates = {SLOW: programs(SLOW), FAST: programs(FAST), LATE: programs(LATE), Tile(64, 16): failed}
    times, beside = tuner.measure(POINT, candidates, with_dot=True)
    assert [measured.tile for measured in times] == [FAST, LATE, SLOW]
    assert all(measured.busy > 0 for measured in times) and beside > 0
    assert "no registers left" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="none of 1 tiles compiled"):
        tuner.measure(POINT, {Tile(64, 16): failed}, with_dot=False)


def test_a_tile_with_other_bits_ends_it(programs):
    with pytest.raises(AssertionError, match=r"values of Tile\(rows=64, columns=64.*unlike those of Tile"):
        tuner.measure(POINT, {FAST: programs(FAST), SLOW: programs(SLOW, 1.0)}, with_dot=False)
