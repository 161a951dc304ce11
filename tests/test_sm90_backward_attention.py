"""The Hopper gradient of attention without a GPU: interpreted on small shapes, lowered for CUDA on real ones."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import query_tiles_sm90 as queries
from pallas_kernels.attention.backward_tiles_sm90 import key_tiles
from pallas_kernels.attention.op import attention
from pallas_kernels.attention.tiles import TILES


@pytest.mark.slow
@pytest.mark.interpret
def test_interpreted():
    """With threads for every warpgroup: on two cores XLA has two, and the interpreter would wait for a third."""
    tests = pathlib.Path(__file__).with_name("interpreted_backward_attention.py")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(tests)]
    run = subprocess.run(
        command, env=os.environ | {"NPROC": "8"}, timeout=590, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout
    assert "4 passed" in run.stdout


CUTS = (
    [512],
    [64] * 8,
    [512] + [0] * 7,
    [64, 0, 192, 64, 0, 192, 0, 0],
    [128, 128, 0, 0, 0, 0, 0, 70],
    [0] * 8,
)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("alignment", [1, 64, 128])
def test_every_row_is_written_once(alignment, head_dim):
    """By a tile of its own sequence, or as a row of none; with the most and the fewest tiles that a cut may need."""
    tokens = 512
    cut = jax.jit(queries.query_tiles, static_argnums=(2, 3, 4))
    for lengths in map(np.array, CUTS):
        if alignment == 128:
            lengths[:-1] = lengths[:-1] // 128 * 128
        start = np.concatenate([[0], np.cumsum(lengths)])
        tiles = cut(
            jnp.asarray(start, jnp.int32), jnp.asarray(lengths, jnp.int32), tokens, head_dim, alignment
        )
        in_rows = tiles.rows is None
        assert in_rows == (alignment > 1 or len(lengths) == 1)
        rows = np.arange(tokens) if in_rows else np.asarray(tiles.rows)
        owner = np.searchsorted(start[1:], rows, side="right").reshape(-1, 64)
        written = np.zeros(len(rows) // 64, int)
        for part in range(tiles.tile // 64):
            surplus = in_rows & (tiles.sequence == len(lengths) - 1)
            at, count, there = queries.chunk_of(tiles.place, tiles.queries, part, len(rows), surplus)
            chunk = np.asarray(at.start)[there] // 64
            np.add.at(written, chunk, 1)
            theirs = owner[chunk] == np.asarray(tiles.sequence)[there, None]
            np.testing.assert_array_equal(theirs, np.arange(64) < np.asarray(count)[there, None])
        needed = in_rows | (rows < start[-1]).reshape(-1, 64).any(axis=1)
        np.testing.assert_array_equal(written, needed)


@pytest.mark.parametrize("window", [None, 1, 64, 150])
def test_every_query_meets_the_keys_that_it_sees_once(window):
    """Against counting one by one: empty sequences, cached prefixes, a shared page, sequences at any row."""
    counts, lens = np.array([70, 0, 130, 1, 200]), np.array([70, 0, 330, 129, 200])
    tables = np.array([[3, 0, 0], [0, 0, 0], [4, 1, 7], [4, 5, 0], [2, 6, 0]])
    starts = np.concatenate([[0], np.cumsum(counts)])
    tokens, (table, start, length) = 410, (jnp.asarray(x, jnp.int32) for x in (tables, starts, lens))
    rows = jnp.arange(1, tokens + 1, dtype=jnp.float32)[:, None, None]
    met = 0
    tiles = jax.jit(queries.query_tiles, static_argnums=(2, 3))(start, length, tokens, 128)
    spread = np.asarray(queries.to_tiles(rows, tiles))[:, 0, 0]
    there_and_back = queries.to_rows(queries.to_tiles(rows, tiles), tiles, tokens)
    np.testing.assert_array_equal(there_and_back, jnp.where(rows <= 401, rows, 0))
    for keys in (64, 128):
        entries = jax.jit(key_tiles, static_argnums=(4, 5, 6))
        found = jax.tree.map(np.asarray, entries(table, start, length, tiles.begin, (8, 128), keys, window))
        pairs = [[], []]
        for number in range(8 * 128 // keys):
            entry, left = found.first[number], found.chunks[number]
            while left > 0:
                for chunk in range(found.count[entry]):
                    at = (found.place[entry] + chunk) * 64 + np.arange(64)
                    query = found.ahead[entry] + chunk * 64 + np.arange(64)[:, None]
                    key = np.arange(keys)
                    mine = np.arange(64) < found.queries[entry] - 64 * chunk
                    np.testing.assert_array_equal(mine, spread[at] > 0)
                    seen = (key <= query) & (key < found.live[entry]) & mine[:, None]
                    if window is not None:
                        seen &= key + window > query
                    i, j = np.nonzero(seen)
                    pairs[0].append(spread[at[i]].astype(int) - 1)
                    pairs[1].append(number * keys + j)
                left -= found.count[entry]
                entry += 1
            assert left == 0
        row, key = map(np.concatenate, pairs)
        order = np.argsort(key, kind="stable")
        same = np.diff(key[order]) == 0
        assert (np.diff(row[order])[same] > 0).all(), "a key meets queries in ascending order"
        ends = np.concatenate([lens[s] - counts[s] + 1 + np.arange(counts[s]) for s in range(len(lens))])
        begins = np.maximum(ends - (window or 10**6), 0)
        owner = np.repeat(np.arange(len(lens)), counts)
        expected = [
            i * 10**6 + tables[owner[i], at // 128] * 128 + at % 128
            for i, at in enumerate(map(np.arange, begins, ends))
        ]
        np.testing.assert_array_equal(np.sort(row * 10**6 + key), np.sort(np.concatenate(expected)))
        met += len(row)
    assert met > 800


@pytest.mark.parametrize(
    ("head_dim", "option"),
    [
        (128, {"window": 200, "soft_cap": 30.0}),
        *(pytest.param(dim, {}, marks=pytest.mark.slow) for dim in (64, 96, 256)),
        pytest.param(256, {"window": 200, "soft_cap": 30.0}, marks=pytest.mark.slow),
        *(pytest.param(dim, {"query_alignment": 64}, marks=pytest.mark.slow) for dim in (128, 256)),
    ],
    ids=str,
)
def test_it_lowers_for_cuda(head_dim, option):
    half, int32 = jnp.bfloat16, jnp.int32
    pages = jax.ShapeDtypeStruct((9, 2, 128, head_dim), half)
    q = jax.ShapeDtypeStruct((300, 8, head_dim), half)
    indices = (jax.ShapeDtypeStruct(shape, int32) for shape in ((3, 8), (4,), (3,)))
    settings = {"scale": 0.125, "max_query_len": 300, "backend": "mosaic_gpu"} | option

    def call(q, k_pages, v_pages, *rest):
        *indices, d_out = rest
        out, pull = jax.vjp(lambda *x: attention(*x, *indices, **settings), q, k_pages, v_pages)
        return out, pull(d_out)

    jax.jit(call).trace(q, pages, pages, *indices, q).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("shared", [True, False])
def test_rematerialised_layers_share_their_tiles(shared):
    """What the model's policy keeps isn't computed again in each layer; without it, it is."""
    policy = jax.checkpoint_policies.save_only_these_names(TILES) if shared else None
    half, int32 = jnp.bfloat16, jnp.int32
    q, pages = (jax.ShapeDtypeStruct(shape, half) for shape in ((256, 4, 128), (9, 2, 128, 128)))
    indices = (jax.ShapeDtypeStruct(shape, int32) for shape in ((3, 8), (4,), (3,)))
    options = {"scale": 0.125, "max_query_len": 256, "query_alignment": 64, "backend": "mosaic_gpu"}
    layer = jax.checkpoint(functools.partial(attention, **options), policy=policy)
    program = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(layer(*x).astype(jnp.float32))))
    again = [e for e in program(q, pages, pages, *indices).eqns if e.primitive.name == "remat2"]
    assert len(again) == 1
    assert (" sort[" in str(again[0])) is not shared
