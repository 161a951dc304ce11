"""Attention: decode, prefill, chunks, batches and page layouts give one bit pattern (xla backend)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.op import attention
from pallas_kernels.numerics import GPU_ATTENTION_TILES, PAGE_SIZE

KV_HEADS, DIM, PAGES_PER_SEQUENCE, POOL = 2, 64, 3, 16
LENGTH = 300
VARIANTS = {
    "plain": {},
    "window": {"window": 70},
    "window_of_pages": {"window": PAGE_SIZE},
    "soft_cap": {"soft_cap": 5.0},
    "window_and_cap": {"window": 33, "soft_cap": 5.0},
}


@functools.cache
def run(variant, max_query_len, scale=DIM**-0.5):
    return jax.jit(
        functools.partial(attention, scale=scale, max_query_len=max_query_len, **VARIANTS[variant])
    )


@functools.cache
def sequence(seed, heads, dtype, dim=DIM):
    """(q [LENGTH, heads, D], k, v [LENGTH, KV_HEADS, D])."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((LENGTH, heads, dim), (LENGTH, KV_HEADS, dim), (LENGTH, KV_HEADS, dim))
    return tuple(
        np.asarray((2 * jax.random.normal(k, s)).astype(dtype)) for k, s in zip(keys, shapes, strict=True)
    )


def paged(sequences, lengths, tables, dtype):
    """Pools with each sequence's first `lengths` keys in its pages; every other slot is NaN or inf."""
    rng = np.random.default_rng(0)
    shape = (POOL, KV_HEADS, PAGE_SIZE, sequences[0][1].shape[2])
    pools = [rng.choice([np.nan, np.inf, -np.inf, 6e4], shape).astype(dtype) for _ in "kv"]
    for (_, *kv), length, table in zip(sequences, lengths, tables, strict=True):
        for pool, rows in zip(pools, kv, strict=True):
            for at in range(length):
                pool[table[at // PAGE_SIZE], :, at % PAGE_SIZE] = rows[at]
    return pools


def step(variant, sequences, begins, ends, tables, dtype, *, tokens=None, decode=None, rows=None):
    """One call: sequence i computes positions begins[i]…ends[i]; returns a list of [n, heads, D] bits."""
    counts = [e - b for b, e in zip(begins, ends, strict=True)]
    total = sum(counts)
    decode = all(n == 1 for n in counts) if decode is None else decode
    rows = rows or len(sequences)
    tokens = rows if decode else (tokens or max(total, 32))
    q = np.full((tokens, *sequences[0][0].shape[1:]), np.nan, dtype)
    q[:total] = np.concatenate([s[0][b:e] for s, b, e in zip(sequences, begins, ends, strict=True)])
    starts = np.cumsum([0, *counts, *[0] * (rows - len(counts))], dtype=np.int32)
    lens = np.asarray([*ends, *[0] * (rows - len(ends))], np.int32)
    table = np.asarray([*tables, *[[0] * PAGES_PER_SEQUENCE] * (rows - len(tables))], np.int32)
    pools = paged(sequences, ends, tables, dtype)
    out = np.asarray(run(variant, 1 if decode else tokens)(q, *pools, table, starts, lens))
    return [out[a:b].view(f"u{out.dtype.itemsize}") for a, b in itertools.pairwise(starts[: len(counts) + 1])]


def prefill(variant, seq, table, dtype, chunk=LENGTH):
    parts = [
        step(
            variant, [seq], [b], [min(b + chunk, LENGTH)], [table], dtype, tokens=max(chunk, 32), decode=False
        )[0]
        for b in range(0, LENGTH, chunk)
    ]
    return np.concatenate(parts)


def decoded(variant, seq, table, dtype, positions):
    return np.concatenate([step(variant, [seq], [p], [p + 1], [table], dtype)[0] for p in positions])


EDGES = [0, 1, 2, 31, 32, 33, 69, 70, 71, 126, 127, 128, 129, 199, 254, 255, 256, 257, 299]


def float64_reference(seq, variant):
    q, k, v = (x.astype(np.float64) for x in seq)
    options = VARIANTS[variant]
    group = q.shape[1] // KV_HEADS
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
    if cap := options.get("soft_cap"):
        scores = np.tanh(scores / cap) * cap
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    visible = (j <= i) & (j > i - options.get("window", LENGTH))
    scores = np.where(visible, scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", probs / probs.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_prefill_and_chunks_agree(variant, dtype):
    dtype = jnp.dtype(dtype)
    seq, table = sequence(0, 4, dtype), [1, 2, 3]
    whole = prefill(variant, seq, table, dtype)
    for chunk in (1, 7, 64, 100):
        if chunk == 1:  # a prefill step of one token; every path below is exact for the rest
            for p in EDGES:
                one = step(variant, [seq], [p], [p + 1], [table], dtype, decode=False)[0]
                np.testing.assert_array_equal(one, whole[p : p + 1])
        else:
            np.testing.assert_array_equal(prefill(variant, seq, table, dtype, chunk), whole)
    np.testing.assert_array_equal(decoded(variant, seq, table, dtype, EDGES), whole[EDGES])
    exact = float64_reference(seq, variant)
    found = whole.view(dtype).astype(np.float64)
    assert np.isfinite(found).all()
    limit = {2: 2e-2 if dtype == jnp.bfloat16 else 3e-3, 4: 3e-6}[dtype.itemsize]
    assert np.abs(found - exact).max() / np.abs(exact).max() < limit


@pytest.mark.slow
def test_every_position_decodes_to_its_prefill():
    dtype = jnp.dtype(jnp.float32)
    seq, table = sequence(0, 4, dtype), [1, 2, 3]
    whole = prefill("plain", seq, table, dtype)
    np.testing.assert_array_equal(decoded("plain", seq, table, dtype, range(LENGTH)), whole)


@pytest.mark.parametrize("heads", [2, 4, 6, 10], ids=lambda h: f"group{h // KV_HEADS}")
def test_any_number_of_query_heads_per_kv_head(heads):
    dtype = jnp.dtype(jnp.float32)
    seq, table = sequence(1, heads, dtype), [4, 9, 2]
    whole = prefill("plain", seq, table, dtype)
    np.testing.assert_array_equal(prefill("plain", seq, table, dtype, 64), whole)
    np.testing.assert_array_equal(decoded("plain", seq, table, dtype, EDGES), whole[EDGES])
    found = whole.view(dtype)
    assert np.abs(found - float64_reference(seq, "plain")).max() < 2e-5


@pytest.mark.parametrize(
    ("dim", "heads", "dtype"),
    [
        (32, 4, "float32"),
        (32, 32, "float16"),
        (64, 32, "float32"),
        (80, 4, "float32"),
        (80, 4, "bfloat16"),
        (80, 6, "float16"),
        (96, 32, "float32"),
        (128, 4, "bfloat16"),
        (256, 4, "float32"),
        (320, 4, "float32"),
    ],
)
def test_head_dims(dim, heads, dtype):
    """Tiles of 1…512 rows (32 queries × 16 heads of a KV head), below and above XLA's thresholds."""
    dtype = jnp.dtype(dtype)
    seq, table = sequence(2, heads, dtype, dim), [1, 2, 3]
    whole = prefill("plain", seq, table, dtype)
    np.testing.assert_array_equal(prefill("plain", seq, table, dtype, 100), whole)
    found = decoded("plain", seq, table, dtype, EDGES[::3])
    np.testing.assert_array_equal(found, whole[EDGES[::3]])


@pytest.mark.parametrize("together", [1, GPU_ATTENTION_TILES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [64, 80])
def test_row_tiles_agree_too(dim, dtype, together, monkeypatch):
    """The path of machines without proven row freedom, of CPUs and of GPUs."""
    monkeypatch.setattr("pallas_kernels.attention.xla.rows_are_free", lambda: False)
    monkeypatch.setattr("pallas_kernels.attention.xla.attention_tiles", lambda: together)
    run.cache_clear()
    try:
        dtype = jnp.dtype(dtype)
        seq, table = sequence(3, 6, dtype, dim), [1, 2, 3]
        whole = prefill("window_and_cap", seq, table, dtype)
        np.testing.assert_array_equal(prefill("window_and_cap", seq, table, dtype, 100), whole)
        found = decoded("window_and_cap", seq, table, dtype, EDGES[::2])
        np.testing.assert_array_equal(found, whole[EDGES[::2]])
    finally:
        run.cache_clear()


@pytest.mark.parametrize("variant", ["plain", "window_and_cap"])
def test_pages_may_lie_anywhere(variant):
    dtype = jnp.dtype(jnp.float32)
    seq = sequence(0, 4, dtype)
    whole = prefill(variant, seq, [1, 2, 3], dtype)
    for seed in range(3):
        table = (1 + np.random.default_rng(seed).permutation(POOL - 1)[:PAGES_PER_SEQUENCE]).tolist()
        np.testing.assert_array_equal(prefill(variant, seq, table, dtype), whole)
        np.testing.assert_array_equal(decoded(variant, seq, table, dtype, EDGES[::3]), whole[EDGES[::3]])


@pytest.mark.parametrize("variant", ["plain", "window_and_cap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_agree_with_each_sequence_alone(variant, dtype):
    """Decode batches of 1…8 rows in any order, and ragged prefill batches, NaN sequences among them."""
    dtype = jnp.dtype(dtype)
    seqs = [sequence(i, 4, dtype) for i in range(5)]
    tables = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14, 15]]
    alone = [prefill(variant, s, [1, 2, 3], dtype) for s in seqs]
    seqs[3] = tuple(np.full_like(x, np.nan) for x in seqs[3])
    rng = np.random.default_rng(1)
    for count, rows in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 5), (5, 8)):
        order = rng.permutation(5)[:count]
        ends = rng.integers(1, LENGTH, count) + 1
        picked, where = [seqs[i] for i in order], [tables[i] for i in order]
        out = step(variant, picked, ends - 1, ends, where, dtype, rows=rows)
        for i, end, bits in zip(order, ends, out, strict=True):
            if i != 3:
                np.testing.assert_array_equal(bits, alone[i][end - 1 : end])
        begins = rng.integers(0, ends)
        out = step(variant, picked, begins, ends, where, dtype, rows=8, tokens=1024, decode=False)
        for i, begin, end, bits in zip(order, begins, ends, out, strict=True):
            if i != 3:
                np.testing.assert_array_equal(bits, alone[i][begin:end])


POISONS = [float("nan"), float("inf"), float("-inf")]


def poisoned(seq, which, at, poison):
    """The sequence with one entry of KV head 0 spoilt, in the key (1) or the value (2) at position `at`."""
    out = [x.copy() for x in seq]
    out[which][at, 0, 5] = poison
    return tuple(out)


def assert_only_rows_that_see_it_are_nan(variant, dtype, at, poison):
    """Rows and heads that don't see the value at `at` keep a clean run's bits, the others are NaN; on every path."""
    seq, table = sequence(0, 4, dtype), [1, 2, 3]
    expected = prefill(variant, seq, table, dtype).view(dtype).copy()
    expected[at : at + VARIANTS[variant].get("window", LENGTH), : seq[0].shape[1] // KV_HEADS] = np.nan
    expected = expected.view(f"u{dtype.itemsize}")
    seq = poisoned(seq, 2, at, poison)
    np.testing.assert_array_equal(prefill(variant, seq, table, dtype), expected)
    np.testing.assert_array_equal(prefill(variant, seq, table, dtype, 100), expected)
    mates, tables = [sequence(1, 4, dtype), seq], [[4, 5, 6], table]
    ends = sorted({e for e in (1, at, at + 1, at + 2, at + 33, at + 34, LENGTH) if 0 < e <= LENGTH})
    for end in ends:
        one = step(variant, [seq], [end - 1], [end], [table], dtype)[0]
        np.testing.assert_array_equal(one, expected[end - 1 : end])
        found = step(variant, mates, [LENGTH - 1, end - 1], [LENGTH, end], tables, dtype)[1]
        np.testing.assert_array_equal(found, expected[end - 1 : end])
    begin = max(at - 3, 0)
    found = step(variant, mates, [7, begin], [LENGTH, LENGTH], tables, dtype, tokens=1024, decode=False)[1]
    np.testing.assert_array_equal(found, expected[begin:])


@pytest.mark.parametrize("variant", ["plain", "window_and_cap"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_unseen_value_may_be_anything(variant, dtype):
    """A value inside the rows' own tile, on a page's edges, in a tile that starts elsewhere."""
    for at, poison in zip((0, 1, 45, 127, 128, 290), 2 * POISONS, strict=True):
        assert_only_rows_that_see_it_are_nan(variant, jnp.dtype(dtype), at, poison)


def test_batches_agree_in_groups_of_tiles(monkeypatch):
    """As on GPUs without kernels of their own, where tiles of several sequences go through one dot."""
    monkeypatch.setattr("pallas_kernels.attention.xla.rows_are_free", lambda: False)
    monkeypatch.setattr("pallas_kernels.attention.xla.attention_tiles", lambda: GPU_ATTENTION_TILES)
    run.cache_clear()
    try:
        test_batches_agree_with_each_sequence_alone("window_and_cap", "bfloat16")
    finally:
        run.cache_clear()


def test_an_unseen_value_may_be_anything_in_row_tiles(monkeypatch):
    monkeypatch.setattr("pallas_kernels.attention.xla.rows_are_free", lambda: False)
    run.cache_clear()
    try:
        for at, poison in zip((0, 130, 290), POISONS, strict=True):
            assert_only_rows_that_see_it_are_nan("window_and_cap", jnp.dtype(jnp.float32), at, poison)
    finally:
        run.cache_clear()


def test_masking_by_zero_probabilities_fails_this(monkeypatch):
    """Negative control: where only the scores are masked, 0 · NaN reaches the earlier rows of a tile."""
    monkeypatch.setattr("pallas_kernels.attention.xla.jnp.isfinite", lambda x: jnp.ones(x.shape, bool))
    run.cache_clear()
    try:
        with pytest.raises(AssertionError):
            assert_only_rows_that_see_it_are_nan("plain", jnp.dtype(jnp.float32), 45, float("nan"))
    finally:
        run.cache_clear()


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("at", [40, 128])
def test_paths_agree_on_infinite_and_nan_keys(at, poison):
    """Also where a page's only seen key scores −inf, and its value is NaN."""
    dtype, table = jnp.dtype(jnp.float32), [1, 2, 3]
    clean = sequence(0, 4, dtype)
    keys = poisoned(clean, 1, at, poison)
    for seq in (keys, poisoned(keys, 2, at, float("nan"))):
        whole = prefill("plain", seq, table, dtype)
        np.testing.assert_array_equal(whole[:at], prefill("plain", clean, table, dtype)[:at])
        np.testing.assert_array_equal(prefill("plain", seq, table, dtype, 100), whole)
        positions = sorted({*EDGES[::3], at - 1, at, at + 1})
        np.testing.assert_array_equal(decoded("plain", seq, table, dtype, positions), whole[positions])


def test_plain_attention_differs():
    """Negative control: one softmax over the whole row, as plain JAX writes it, is another matter."""
    q, k, v = (jnp.asarray(x) for x in sequence(0, 4, jnp.dtype(jnp.float32)))
    k, v = jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)

    @functools.partial(jax.jit, static_argnames="first")
    def plain(q, k, v, first):
        return jax.nn.dot_product_attention(
            q[None, first:],
            k[None],
            v[None],
            mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None, first:],
        )[0]

    whole = np.asarray(plain(q, k, v, 0))
    differ = sum((np.asarray(plain(q, k, v, p))[0] != whole[p]).sum() for p in (299, 280, 200, 100))
    assert differ > 0
