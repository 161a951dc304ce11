"""RoPE, q/k norm and the cache write of the xla backend: bits, slots and the trash page."""

import functools
import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE
from pallas_kernels.rope_cache.op import rope_cache, rope_table

Q_HEADS, KV_HEADS, DIM, PAGES, LENGTH = 6, 2, 64, 5, 2048
DTYPES = ("float32", "bfloat16", "float16")
FREQUENCIES = 1e4 ** -(np.arange(DIM // 2) / (DIM // 2))


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def weights(norm):
    rng = np.random.default_rng(9)
    return {f"{n}_norm": rng.standard_normal(DIM).astype(np.float32) if norm else None for n in "qk"}


def pools(dtype):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((PAGES, KV_HEADS, PAGE_SIZE, DIM)).astype(dtype) for _ in "kv"]


@functools.cache
def op(norm):
    return jax.jit(partial(rope_cache, num_q_heads=Q_HEADS, num_kv_heads=KV_HEADS, **weights(norm)))


def step(norm, qkv, positions, slots):
    table = rope_table(FREQUENCIES, LENGTH)
    return [np.asarray(x) for x in op(norm)(qkv, *pools(qkv.dtype), table, positions, slots)]


def inputs(count, dtype):
    rng = np.random.default_rng(2)
    qkv = rng.standard_normal((count, (Q_HEADS + 2 * KV_HEADS) * DIM)).astype(jnp.dtype(dtype))
    positions = rng.integers(0, LENGTH, count).astype(np.int32)
    slots = PAGE_SIZE + rng.permutation((PAGES - 1) * PAGE_SIZE)[:count].astype(np.int32)
    return qkv, positions, slots


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_never_sees_the_others(dtype, norm):
    """Batches of 1…130 tokens in any order, neighbours poisoned: q, k and v of a token keep their bits."""
    qkv, positions, slots = inputs(8, dtype)
    alone = []
    for i in range(8):
        q, *cache = step(norm, qkv[i : i + 1], positions[i : i + 1], slots[i : i + 1])
        page, offset = divmod(slots[i], PAGE_SIZE)
        alone.append((bits(q[0]), *(bits(pool[page, :, offset]) for pool in cache)))
    rng = np.random.default_rng(3)
    for count in (2, 33, 130):
        picked, where = rng.integers(0, 8, count), inputs(count, dtype)[2]
        poisoned = rng.random(count) < 0.3
        x = qkv[picked]
        with np.errstate(over="ignore"):
            x[poisoned] = rng.choice([np.nan, np.inf, 1e30], (poisoned.sum(), 1)).astype(x.dtype)
        q, *cache = step(norm, x, positions[picked], where)
        for row in np.flatnonzero(~poisoned):
            page, offset = divmod(where[row], PAGE_SIZE)
            found = (bits(q[row]), *(bits(pool[page, :, offset]) for pool in cache))
            for a, b in zip(found, alone[picked[row]], strict=True):
                np.testing.assert_array_equal(a, b)
        touched = np.zeros((PAGES, PAGE_SIZE), bool)
        touched[where // PAGE_SIZE, where % PAGE_SIZE] = True
        for pool, before in zip(cache, pools(qkv.dtype), strict=True):
            kept = np.swapaxes(bits(pool), 1, 2)[~touched]
            np.testing.assert_array_equal(kept, np.swapaxes(bits(before), 1, 2)[~touched])


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_to_float64(dtype, norm):
    qkv, positions, slots = inputs(40, dtype)
    q, k_pages, v_pages = step(norm, qkv, positions, slots)
    x = qkv.astype(np.float64).reshape(40, -1, DIM)
    parts = [x[:, :Q_HEADS], x[:, Q_HEADS : Q_HEADS + KV_HEADS]]
    angle = positions[:, None, None] * FREQUENCIES
    for part, found, weight in zip(
        parts,
        (q, k_pages[slots // PAGE_SIZE, :, slots % PAGE_SIZE]),
        weights(norm).values(),
        strict=True,
    ):
        if weight is not None:
            part = part / np.sqrt((part**2).mean(-1, keepdims=True) + 1e-6) * weight
        a, b = part[..., : DIM // 2], part[..., DIM // 2 :]
        exact = np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
        )
        limit = (2e-6 + jnp.finfo(found.dtype).eps) * np.abs(exact).max()
        assert np.abs(found.astype(np.float64) - exact).max() < limit
    values = v_pages[slots // PAGE_SIZE, :, slots % PAGE_SIZE]
    np.testing.assert_array_equal(bits(values), bits(qkv.reshape(40, -1, DIM)[:, Q_HEADS + KV_HEADS :]))


def test_padding_writes_to_the_trash_page_only():
    """Many padded tokens, NaN among them, share one trash slot; all other pages keep their bits."""
    qkv, positions, slots = inputs(4, "float32")
    q, *cache = step(False, qkv, positions, slots)
    padded = np.concatenate([qkv, np.full((28, qkv.shape[1]), np.nan, np.float32)])
    more = np.zeros(28, np.int32)
    trash = np.full(28, TRASH_PAGE * PAGE_SIZE, np.int32)
    q2, *cache2 = step(False, padded, np.concatenate([positions, more]), np.concatenate([slots, trash]))
    np.testing.assert_array_equal(bits(q2[:4]), bits(q))
    pages = np.arange(PAGES) != TRASH_PAGE
    for a, b in zip(cache2, cache, strict=True):
        np.testing.assert_array_equal(bits(a[pages]), bits(b[pages]))


def test_the_table_is_data():
    """Its digest is pinned; XLA's cosine would give other bits (the negative control)."""
    table = rope_table(FREQUENCIES, LENGTH)
    assert table.dtype == np.float32 and table.shape == (LENGTH, DIM)
    assert hashlib.sha256(table.tobytes()).hexdigest() == (
        "7779050348d097cbe88e6c0df85fd83de47a451e710ed1d2416dc8b9a029f0d8"
    )
    angle = (np.arange(LENGTH)[:, None] * FREQUENCIES).astype(np.float32)
    assert (bits(jax.jit(jnp.cos)(angle)) != bits(table[:, : DIM // 2])).mean() > 0.01
    np.testing.assert_array_equal(bits(rope_table(FREQUENCIES, 100)), bits(table[:100]))
    np.testing.assert_allclose(rope_table(FREQUENCIES, 100, 0.5), table[:100] / 2, atol=1e-7)


def test_contracted_rotation_differs():
    """Negative control: x₁c − x₂s with the first product unrounded, as a compiler may make of it, has other bits."""
    qkv, positions, slots = inputs(40, "float32")
    q = step(False, qkv, positions, slots)[0]
    angle = rope_table(FREQUENCIES, LENGTH)[positions][:, None]
    cos, sin = angle[..., : DIM // 2], angle[..., DIM // 2 :]
    x = qkv.reshape(40, -1, DIM)[:, :Q_HEADS]
    a, b = x[..., : DIM // 2], x[..., DIM // 2 :]
    rounded = a * cos - b * sin
    fused = (a.astype(np.float64) * cos - (b * sin).astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(bits(q[..., : DIM // 2]), bits(rounded))
    assert (bits(fused) != bits(rounded)).any()
