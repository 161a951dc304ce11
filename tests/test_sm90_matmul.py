"""The Hopper matmul without a GPU: interpreted on small shapes, lowered for CUDA on real ones."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet.engine.buckets import Buckets
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.matmul import mosaic_gpu_sm90 as kernel
from pallas_kernels.matmul import tuning_sm90
from pallas_kernels.matmul.tuning_sm90 import DEFAULT, TABLES, Tile
from pallas_kernels.matmul.tuning_sm90 import tile as tuned_tile

K, N = 192, 128


def _operands(rows, k=K, n=N):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, k)).astype(jnp.bfloat16)
    w = (jax.random.normal(keys[1], (k, n)) * 0.1).astype(jnp.bfloat16)
    return x, w, jax.random.normal(keys[2], (rows, n)).astype(jnp.bfloat16)


def _error(found, exact):
    """‖found − exact‖ / ‖exact‖, in float64."""
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.interpret
def test_rows_do_not_depend_on_batch_or_neighbours():
    x, w, residual = _operands(70)
    packed, bias, tile = kernel.pack(w), jnp.arange(N, dtype=jnp.float32), Tile(64, 64)

    def run(rows, x=x):
        with gpu_interpreter():
            y = kernel.matmul(x[:rows], packed, n=N, bias=bias, residual=residual[:rows], tile=tile)
        return np.asarray(y).view(np.uint16)

    full = run(70)
    for rows in (1, 3, 9):
        np.testing.assert_array_equal(run(rows), full[:rows])
    poisoned = x.at[1::2].set(jnp.nan)
    np.testing.assert_array_equal(run(70, poisoned)[::2], full[::2])
    exact = (
        np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        + np.arange(N)
        + np.asarray(residual, np.float64)
    )
    assert _error(full.view(x.dtype), exact) < 3e-3


@pytest.mark.interpret
def test_gated_product_is_close_to_float64():
    x, gate, _ = _operands(8, n=64)
    up = jnp.roll(gate, 1, axis=0)
    with gpu_interpreter():
        y = kernel.gated_matmul(x, kernel.pack_gated(gate, up), n=64, activation="silu", tile=Tile(64, 64))
    g, u = (np.asarray(x, np.float64) @ np.asarray(w, np.float64) for w in (gate, up))
    exact = g / (1 + np.exp(-g)) * u
    assert _error(y, exact) < 3e-3


@pytest.mark.interpret
def test_more_steps_than_stages_are_close_to_float64():
    x, w, _ = _operands(3, k=1024, n=64)
    with gpu_interpreter():
        y = kernel.matmul(x, kernel.pack(w), n=64, tile=Tile(64, 64))
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert _error(y, exact) < 3e-3


def test_pack_round_trips_and_looks_up_columns():
    w = np.arange(100 * 70, dtype=np.float32).reshape(100, 70)
    packed = kernel.pack(w)
    assert packed.shape == (2, 128, 64)
    np.testing.assert_array_equal(kernel.unpack(packed, 100, 70), w)
    picked = kernel.take_columns(jnp.asarray(packed), jnp.array([3, 69]), 100)
    np.testing.assert_array_equal(picked, w[:, [3, 69]].T)


ENTRIES = [
    (int(rows), shape, Tile(*entry))
    for table in TABLES.values()
    for shape, buckets in table.items()
    for rows, entry in buckets.items()
]
TILES = {tile for *_, tile in ENTRIES} | set(DEFAULT.values())
TILE_SHAPES = {dataclasses.replace(tile, band=16, tail=0, stages=0) for tile in TILES}
"""Of which a product of few steps in two rows of tiles makes different programs."""


@pytest.fixture(params=TABLES)
def gpu(request):
    """A GPU with a table of its own."""
    tuning_sm90.assume(request.param)
    yield request.param
    tuning_sm90.assume(None)


def test_a_gpu_has_its_own_tiles_and_others_those_of_an_h200(gpu):
    assert tuning_sm90.table() is TABLES[gpu]
    tuning_sm90.assume(f"{gpu} of another size")
    assert tuning_sm90.table() is TABLES[gpu]
    tuning_sm90.assume("NVIDIA GH200 480GB")
    assert tuning_sm90.table() is TABLES["NVIDIA H200"]


@pytest.mark.parametrize(
    "limits", [(1000, 8192, 64), (300, 5000, 40), (8, 256, 8), (64, 2048, 16), (1, 32, 4)]
)
def test_the_rows_of_a_step_fill_whole_tiles(gpu, limits):
    """So no product copies x to fill it up: of any matrix of the table, in any bucket of an engine."""
    buckets = Buckets(*limits, "mosaic_gpu")
    for bucket in buckets.all():
        rows = bucket.rows + bucket.tokens
        for shape in (*TABLES[gpu], "576x960"):
            tile = tuned_tile(rows, *map(int, shape.split("x")), kernel.column_unit())
            assert rows <= tile.rows or rows % tile.rows == 0, (bucket, shape)
    for rows, tokens in itertools.product(
        range(0, buckets.most_mixed_rows + 1, 7), {1, min(33, limits[1]), limits[1]}
    ):
        found = buckets.fit(rows, tokens, 3)
        assert found in buckets.all() and found.rows >= rows and found.tokens >= tokens
    if limits[0] > 1:
        sizes, plain = ({b.rows + b.tokens for b in each.all()} for each in (buckets, Buckets(*limits)))
        assert sizes != plain, "elsewhere rows stay as they are"


def test_parts_hold_every_column_once():
    """Whole rounds of the SMs in wide tiles, the rest in narrow ones; at every entry of the table, and elsewhere."""
    entries = [(rows, int(shape.split("x")[1]), tile) for rows, shape, tile in ENTRIES]
    assert any(tile.tail for *_, tile in entries)
    rng = random.Random(0)
    others = [
        (rng.randint(1, 9000), 64 * rng.randint(1, 2400), Tile(64, rng.choice((64, 192)), tail=64))
        for _ in range(300)
    ]
    for rows, columns, tile in entries + others:
        row_tiles = -(-rows // tile.rows)
        parts = kernel.parts_of(row_tiles, columns, tile)
        assert parts[0].begin == 0 and parts[-1].begin + parts[-1].count * parts[-1].width >= columns
        if len(parts) == 1:
            continue
        whole, tail = parts
        assert (
            tail.begin == whole.count * whole.width < columns
            and (tail.count - 1) * tail.width < columns - tail.begin
        )
        rounds, left = divmod(row_tiles * whole.count, kernel.SMS)
        assert left == 0 or kernel.SMS - left < row_tiles, "a round is as full as whole columns make it"
        assert rounds >= 1 or row_tiles * whole.count > kernel.SMS - row_tiles


@pytest.fixture
def few_sms(gpu_of):
    gpu_of(3, kernel, kernel._kernel)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "n", "tile"),
    [
        (5, 448, Tile(64, 128, tail=64)),
        (70, 448, Tile(64, 64, 128, tail=32)),
        (130, 448, Tile(128, 128, 64, 2, 16, 64)),
    ],
)
def test_narrow_tiles_of_a_last_round(few_sms, rows, n, tile):
    """Close to float64, with all that an epilogue adds; rows don't feel their neighbours."""
    assert len(kernel.parts_of(-(-rows // tile.rows), n, tile)) == 2
    x, w, residual = _operands(rows, n=n)
    packed, bias, some = kernel.pack(w), jnp.arange(n, dtype=jnp.float32), np.array([0, rows - 1])

    def run(x):
        with gpu_interpreter():
            return kernel.matmul(x, packed, n=n, bias=bias, residual=residual, tile=tile)

    full, wide = run(x), [np.asarray(a, np.float64) for a in (x, w, residual, bias)]
    exact = wide[0] @ wide[1] + wide[2] + wide[3]
    assert _error(full, exact) < 3e-3
    apart, whole = (
        np.asarray(y).view(np.uint16) for y in (run(jnp.full_like(x, jnp.nan).at[some].set(x[some])), full)
    )
    np.testing.assert_array_equal(apart[some], whole[some])
    assert (apart != whole).any(), "the comparison sees the poisoned rows"


@pytest.mark.interpret
def test_narrow_tiles_of_a_gated_product(few_sms):
    """With what a gradient needs saved: all columns of both results."""
    tile, n = Tile(64, 128, tail=64), 224
    assert len(kernel.parts_of(1, 2 * n, tile)) == 2
    x, w, _ = _operands(5, n=2 * n)
    gate, up = jnp.split(w, 2, axis=1)
    with gpu_interpreter():
        y, inner = kernel.gated_matmul_saving(
            x, kernel.pack_gated(gate, up), n=n, activation="silu", tile=tile
        )
    a, b = (np.asarray(x, np.float64) @ np.asarray(half, np.float64) for half in (gate, up))
    saved = kernel.unpack_gated(kernel.pack(inner), 5, n)
    for got, exact in ((y, a / (1 + np.exp(-a)) * b), (saved[0], a), (saved[1], b)):
        assert _error(got, exact) < 1e-2


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "n", "tile"),
    [
        (130, 448, Tile(64, 96, cluster=3)),
        (250, 448, Tile(64, 64, stages=2, cluster=2)),
        (250, 448, Tile(128, 128, 64, 2, 16, 64, cluster=2)),
    ],
)
def test_clusters_have_the_bits_of_single_ctas(gpu_of, rows, n, tile):
    """Several tiles a cluster, with all that an epilogue adds; rows don't feel those of other members.

    The interpreter has as many threads as there are CPUs, so that of more than two warpgroups that wait for stages
    to come round one may never run: here only those of a cluster of two do.
    """
    gpu_of(6, kernel, kernel._kernel)
    x, w, residual = _operands(rows, n=n)
    packed, bias, some = kernel.pack(w), jnp.arange(n, dtype=jnp.float32), np.array([0, 64, rows - 1])
    row_tiles = -(-rows // tile.rows)
    parts = kernel.parts_of(row_tiles, n, tile)
    assert kernel.cluster_of(tile, row_tiles, parts, tile.depth // kernel.K_BLOCK) == tile.cluster
    assert row_tiles * sum(part.count for part in parts) > tile.cluster * kernel.clusters_at_once(
        tile.cluster
    )

    def run(x, tile=tile):
        with gpu_interpreter():
            y = kernel.matmul(x, packed, n=n, bias=bias, residual=residual, tile=tile)
        return np.asarray(y).view(np.uint16)

    full = run(x)
    np.testing.assert_array_equal(full, run(x, dataclasses.replace(tile, cluster=1)))
    apart = run(jnp.full_like(x, jnp.nan).at[some].set(x[some]))
    np.testing.assert_array_equal(apart[some], full[some])
    assert (apart != full).any(), "the comparison sees the poisoned rows"


@pytest.mark.parametrize(
    ("tile", "row_tiles", "cluster"),
    [
        (Tile(64, 144, cluster=3), 3, 3),
        (Tile(64, 144, cluster=3), 4, 1),  # a member would have no row tile
        (Tile(64, 128, cluster=3), 3, 1),  # 128 columns can't be shared out in eights
        (Tile(64, 144, 128, cluster=3), 3, 1),  # nor two blocks of k
        (Tile(64, 72, 128, cluster=2), 2, 2),
        (Tile(64, 128, tail=24, cluster=2), 4, 1),  # nor the tail's
    ],
)
def test_ctas_form_clusters_where_they_can_share_evenly(tile, row_tiles, cluster):
    parts = kernel.parts_of(row_tiles, 5120, tile)
    assert kernel.cluster_of(tile, row_tiles, parts, tile.depth // kernel.K_BLOCK) == cluster


@pytest.mark.parametrize("tile", sorted(TILES, key=repr), ids=repr)
def test_every_tile_lowers_for_cuda(tile):
    struct, rows = jax.ShapeDtypeStruct, 512 * tile.cluster
    x, packed = struct((rows, 4096), jnp.bfloat16), struct((64, 51200, 64), jnp.bfloat16)
    parts = kernel.parts_of(rows // tile.rows, 51200, tile)
    assert len(parts) == (2 if tile.tail else 1)
    assert kernel.cluster_of(tile, rows // tile.rows, parts, tile.depth // kernel.K_BLOCK) == tile.cluster
    product = jax.jit(lambda x, w: kernel.matmul(x, w, n=51200, tile=tile))
    product.trace(x, packed).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("rows", "copies"), [(1, False), (9, True), (40, False), (96, False), (130, True), (192, True)]
)
def test_part_of_a_tile_lowers_for_cuda(rows, copies):
    """Multiples of 8 within one tile are neither padded nor cut; `copies` says whether others are."""
    x, w, residual = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 4096), (64, 6144, 64), (rows, 6144))
    )
    product = jax.jit(lambda *a: kernel.matmul(*a[:2], n=6144, residual=a[2], tile=Tile(128, 128, 64, 2)))
    text = product.trace(x, w, residual).lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.pad" in text or "stablehlo.slice" in text) == copies
    gated = jax.jit(lambda x, w: kernel.gated_matmul_saving(x, w, n=12288, activation="silu"))
    gated.trace(x, jax.ShapeDtypeStruct((64, 24576, 64), jnp.bfloat16)).lower(lowering_platforms=("cuda",))


def test_stages_fit_and_do_not_crowd_memory():
    """What is on its way into an SM fits its shared memory; in tiles of 64 rows it is at most what reads fastest."""

    def stages(tile, residual=0, held=0, most=99):
        return kernel.stages_of(tile, tile.depth, residual, held, most)

    assert stages(Tile(256, 192, row_groups=2)) == 4  # 56 KB each, of 226
    assert stages(Tile(256, 192, row_groups=2), residual=16 * 1024) == 3
    assert stages(Tile(64, 32, 128)) == 8  # 24 KB each: nine would fit
    assert stages(Tile(64, 48, 128), held=180 * 1024) == 3  # 12 KB each, of what rows and their sums leave
    assert stages(Tile(64, 192, stages=4)) == 4
    assert stages(Tile(64, 64), most=3) == 3  # the steps that there are
    for tile in TILES:
        size = (tile.rows + tile.columns) * tile.depth * 2
        assert 2 * size <= stages(tile) * size <= kernel.SHARED_BYTES - kernel.BARRIER_BYTES


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("tile", sorted(TILE_SHAPES, key=repr), ids=repr)
def test_every_tile_keeps_rows_apart_and_is_close_to_float64(tile):
    rows = tile.rows * max(1, tile.cluster - 1) + 8
    columns = -(-(tile.columns + 8) // 64) * 64
    x, w, residual = _operands(rows, k=128, n=columns)
    packed, some = kernel.pack(w), np.array([0, 7, tile.rows - 1, tile.rows, rows - 1])

    def run(x):
        with gpu_interpreter():
            return kernel.matmul(x, packed, n=columns, residual=residual, tile=tile)

    full = run(x)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(residual, np.float64)
    assert _error(full, exact) < 3e-3
    poisoned = jnp.full_like(x, jnp.nan).at[some].set(x[some])
    apart, full = (np.asarray(y).view(np.uint16) for y in (run(poisoned), full))
    np.testing.assert_array_equal(apart[some], full[some])
    assert (apart != full).any(), "the comparison sees the poisoned rows"


@pytest.mark.interpret
def test_a_gated_product_keeps_gate_and_up_together(monkeypatch):
    """Also where a matrix of its shape that isn't gated has tiles which would part them."""
    monkeypatch.setitem(tuning_sm90.table(), "256x384", {"8": [64, 48, 64, 1, 16, 0]})
    x, w, _ = _operands(5, k=256, n=384)
    gate, up = jnp.split(w, 2, axis=1)
    packed = kernel.pack_gated(gate, up)
    with gpu_interpreter():
        y = kernel.gated_matmul(x, packed, n=192, activation="silu")
    a, b = (np.asarray(x, np.float64) @ np.asarray(half, np.float64) for half in (gate, up))
    assert _error(y, a / (1 + np.exp(-a)) * b) < 3e-3
    with pytest.raises(ValueError, match=r"tile.columns=48 must be a multiple of 64"):
        kernel.gated_matmul(x, packed, n=192, activation="silu", tile=Tile(64, 48))


@pytest.mark.parametrize("tail", [32, 96, 128, 192])
def test_a_gated_tail_keeps_gate_and_up_together(tail):
    x, w, _ = _operands(2, n=256)
    packed = kernel.pack_gated(*jnp.split(w, 2, axis=1))
    with pytest.raises(ValueError, match=r"tail=\d+ must be a multiple of 64 below tile.columns=128"):
        kernel.gated_matmul(x, packed, n=128, activation="silu", tile=Tile(64, 128, tail=tail))


def test_wrong_dtype_names_the_backend_that_works():
    x, w, _ = _operands(2)
    with pytest.raises(ValueError, match="use backend='xla'"):
        kernel.matmul(x.astype(jnp.float32), kernel.pack(w), n=N)
