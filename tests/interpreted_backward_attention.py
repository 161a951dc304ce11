"""The Hopper gradient of attention, interpreted; run by test_sm90_backward_attention.py in a process of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import backward_sm90 as backward
from pallas_kernels.attention import backward_xla, query_tiles_sm90
from pallas_kernels.attention import mosaic_gpu_sm90 as kernel
from pallas_kernels.compat import gpu_interpreter

OPTIONS = {"scale": 0.125, "window": None, "soft_cap": None}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def bits(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def pools(pages, keys, values):
    """Pages of NaN, of which `pages` hold the keys and values [length, Hkv, D]."""
    pool = np.full((2, 4, keys.shape[1], 128, keys.shape[2]), np.nan, jnp.bfloat16)
    for i, page in enumerate(pages):
        for which, x in zip(pool, (keys, values), strict=True):
            part = np.asarray(x[i * 128 : (i + 1) * 128])
            which[page, :, : len(part)] = part.transpose(1, 0, 2)
    return pool


def indices(tables, counts, lens):
    starts = np.concatenate([[0], np.cumsum(counts)])
    return [jnp.asarray(x, jnp.int32) for x in (tables, starts, lens)]


def gradients(q, pool, tables, counts, lens, d_out, alignment=1, **option):
    """(dq, dk, dv, result, and the result of the kernel that keeps nothing)"""
    options = OPTIONS | option

    @jax.jit
    def call(q, k_pages, v_pages, tables, starts, lens):
        operands = q, k_pages, v_pages, tables, starts, lens
        tiles = kernel.batch_tiles(*operands, window=options["window"], query_alignment=alignment)
        out, saved = kernel.attention_saving(*operands, **options, tiles=tiles)
        plain = kernel.attention(*operands, **options, max_query_len=q.shape[0], tiles=tiles)
        return *backward.attention(*operands, saved, d_out, **options), out, plain

    with gpu_interpreter():
        return jax.block_until_ready(call(q, *pool, *indices(tables, counts, lens)))


@pytest.mark.parametrize(
    ("widest", "before", "without_keys", "alignment"),
    [(query_tiles_sm90.WIDEST, 9, 5, 1), (query_tiles_sm90.WIDEST, 64, 64, 64), (32, 9, 5, 1)],
)
def test_a_sequence_has_the_same_gradients_alone_and_beside_nan(
    widest, before, without_keys, alignment, monkeypatch
):
    """130 tokens on two pages behind some of NaN and some without keys, and alone on other pages; close to float64.

    All rows of no sequence are NaN. A head_dim of 64 goes the way of 256 too.
    """
    monkeypatch.setattr(query_tiles_sm90, "WIDEST", widest)
    length, head_dim = 130, 64
    q, d_out = normal(0, length, 2, head_dim), normal(1, length, 2, head_dim)
    k, v = normal(2, length, 1, head_dim), normal(3, length, 1, head_dim)

    def between(before, after, *arrays):
        return (jnp.pad(x, ((before, after), (0, 0), (0, 0)), constant_values=jnp.nan) for x in arrays)

    rows, d_rows = between(0, 90, q, d_out)
    alone = gradients(rows, pools([3, 1], k, v), [[3, 1]], [length], [length], d_rows)
    first = before + without_keys
    rows, d_rows = between(first, 90, q, d_out)
    tables, counts, lens = [[1, 0], [0, 0], [2, 3]], [before, without_keys, length], [before, 0, length]
    packed = gradients(rows, pools([2, 3], k, v), tables, counts, lens, d_rows, alignment)
    compared, dead = 0, 0
    for got, want, ours, theirs in zip(
        packed,
        alone,
        (np.s_[first:-90], [2, 3], [2, 3], np.s_[first:-90], np.s_[first:-90]),
        (np.s_[:length], [3, 1], [3, 1], np.s_[:length], np.s_[:length]),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(got)[ours], bits(want)[theirs])
        compared += bits(want)[theirs].size
    assert compared == (3 * length * 2 + 4 * 128) * head_dim
    for (dq, _, _, out, plain), none in ((alone, np.s_[:0]), (packed, np.s_[before:first])):
        np.testing.assert_array_equal(bits(out), bits(plain))
        for rows in (dq[none], dq[-90:], out[none], out[-90:]):
            assert not bits(rows).any()
            dead += rows.size
    assert dead == 2 * (90 + without_keys + 90) * 2 * head_dim
    assert np.isnan(packed[0][:before]).all() and np.isnan(packed[1][1, :, :before]).all(), (
        "its neighbour is NaN"
    )

    def loss(q, k, v):
        scores = jnp.einsum("thd,shd->hts", q, jnp.repeat(k, 2, axis=1)) * OPTIONS["scale"]
        scores = jnp.where(np.tri(length, dtype=bool), scores, -jnp.inf)
        out = jnp.einsum("hts,shd->thd", jax.nn.softmax(scores, axis=-1), jnp.repeat(v, 2, axis=1))
        return jnp.sum(out * np.asarray(d_out, np.float64))

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        exact = [np.asarray(g) for g in jax.grad(loss, (0, 1, 2))(*wide)]
    dq, *pages = (np.asarray(x, np.float64) for x in alone[:3])
    found = dq[:length], *(x[[3, 1]].transpose(0, 2, 1, 3).reshape(256, 1, head_dim)[:length] for x in pages)
    for got, want in zip(found, exact, strict=True):
        assert np.linalg.norm(got - want) <= 5e-3 * np.linalg.norm(want)


def test_shared_pages_windows_and_caps_are_close_to_the_xla_backend():
    """Two sequences share a page of 128 keys; one has 12 queries behind it, the other 20."""
    dim, option = 64, {"window": 100, "soft_cap": 3.0}
    q, d_out = normal(0, 32, 4, dim), normal(1, 32, 4, dim)
    pool = pools([3, 1], normal(2, 140, 2, dim), normal(3, 140, 2, dim))
    pool[:, 2, :, :20] = normal(4, 2, 2, 20, dim)
    arguments = [[3, 1], [3, 2]], [12, 20], [140, 148]
    found = gradients(q, pool, *arguments, d_out, **option)[:3]
    q, pool, d_out = (np.asarray(x, np.float32) for x in (q, pool, d_out))
    plain = jax.jit(functools.partial(backward_xla.attention, **OPTIONS | option))
    exact = plain(q, *pool, *indices(*arguments), None, d_out)
    for got, want in zip(found, exact, strict=True):
        assert np.linalg.norm(np.asarray(got, np.float32) - want) <= 5e-3 * np.linalg.norm(want)
