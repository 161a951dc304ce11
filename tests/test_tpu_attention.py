"""The TPU attention, interpreted: decode, prefill, chunks, batches and page layouts give one bit pattern."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_rows import bits, error

from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention.op import attention
from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.numerics import PAGE_SIZE

pytestmark = pytest.mark.interpret
KV_HEADS, LENGTH, TABLE, POOL = 2, 300, 3, 9
EDGES = [0, 1, 31, 32, 69, 70, 71, 127, 128, 129, 199, 255, 256, 257, 299]
VARIANTS = {
    "plain": {},
    "window": {"window": 70},
    "window_of_pages": {"window": PAGE_SIZE},
    "window_and_cap": {"window": 33, "soft_cap": 5.0},
}


@functools.cache
def call(variant, max_query_len, dim):
    options = {"scale": dim**-0.5, "max_query_len": max_query_len, "backend": "mosaic_tpu"}
    return jax.jit(functools.partial(attention, **options, **VARIANTS[variant]))


@functools.cache
def sequence(seed, heads, dim, dtype):
    """q [LENGTH, heads, D], k and v [LENGTH, KV_HEADS, D]."""
    rng = np.random.default_rng(seed)
    shapes = ((LENGTH, heads, dim), (LENGTH, KV_HEADS, dim), (LENGTH, KV_HEADS, dim))
    return tuple((2 * rng.standard_normal(shape)).astype(dtype) for shape in shapes)


def paged(sequences, lengths, tables):
    """Pools with each sequence's first `lengths` keys in its pages; every other slot is NaN or infinite."""
    rng = np.random.default_rng(0)
    like = sequences[0][1]
    shape = (POOL, KV_HEADS, PAGE_SIZE, like.shape[2])
    pools = [rng.choice([np.nan, np.inf, -np.inf, 1e30], shape).astype(like.dtype) for _ in "kv"]
    for (_, *kv), length, table in zip(sequences, lengths, tables, strict=True):
        for pool, keys in zip(pools, kv, strict=True):
            for at in range(length):
                pool[table[at // PAGE_SIZE], :, at % PAGE_SIZE] = keys[at]
    return pools


def step(variant, sequences, begins, ends, tables, *, decode=False, tokens=0, rows=0):
    """One call: sequence i computes positions begins[i]…ends[i]; returns the bits of each, [n, heads, D]."""
    counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
    rows = rows or len(sequences)
    tokens = rows if decode else max(tokens, sum(counts))
    q = np.full((tokens, *sequences[0][0].shape[1:]), np.nan, sequences[0][0].dtype)
    q[: sum(counts)] = np.concatenate([s[0][b:e] for s, b, e in zip(sequences, begins, ends, strict=True)])
    starts = np.cumsum([0, *counts, *[0] * (rows - len(counts))], dtype=np.int32)
    lens = np.asarray([*ends, *[0] * (rows - len(ends))], np.int32)
    table = np.asarray([*tables, *[[0] * TABLE] * (rows - len(tables))], np.int32)
    pools = paged(sequences, ends, tables)
    with tpu_interpreter():
        out = bits(call(variant, 1 if decode else tokens, q.shape[2])(q, *pools, table, starts, lens))
    return [out[a:b] for a, b in itertools.pairwise(starts[: len(counts) + 1])]


def prefill(variant, seq, table, chunk=LENGTH):
    parts = [
        step(variant, [seq], [begin], [min(begin + chunk, LENGTH)], [table], tokens=chunk)[0]
        for begin in range(0, LENGTH, chunk)
    ]
    return np.concatenate(parts)


def float64_reference(seq, variant):
    q, k, v = (x.astype(np.float64) for x in seq)
    options = VARIANTS[variant]
    k, v = (np.repeat(x, q.shape[1] // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    if cap := options.get("soft_cap"):
        scores = np.tanh(scores / cap) * cap
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
    scores = np.where((j <= i) & (j > i - options.get("window", LENGTH)), scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", probs / probs.sum(-1, keepdims=True), v)


def assert_close(found, exact):
    limit = 2e-2 if found.dtype == jnp.bfloat16 else 3e-6
    assert error("attention", found, exact) < limit


@pytest.mark.parametrize(("dim", "dtype"), [(64, jnp.bfloat16), (128, jnp.float32)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode_prefill_and_chunks_agree(variant, dim, dtype):
    seq, table = sequence(0, 4, dim, dtype), [1, 2, 3]
    whole = prefill(variant, seq, table)
    for chunk in (77, 128):
        np.testing.assert_array_equal(prefill(variant, seq, table, chunk), whole)
    for position in EDGES:
        one = step(variant, [seq], [position], [position + 1], [table], decode=True)[0]
        np.testing.assert_array_equal(one, whole[position : position + 1])
    assert_close(whole.view(dtype), float64_reference(seq, variant))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("dim", "variant"), [(96, "plain"), (256, "window_and_cap")])
def test_other_head_dims_agree_too(dim, variant, dtype):
    """Pages that lie transposed though they are wide, and the widest."""
    seq, table = sequence(0, 4, dim, dtype), [1, 2, 3]
    whole = prefill(variant, seq, table)
    np.testing.assert_array_equal(prefill(variant, seq, table, 77), whole)
    for batch in ([0], [127, 128, 299]):
        beside = [seq] * len(batch), batch, [position + 1 for position in batch]
        tables = [[1, 2, 3], [4, 5, 6], [7, 8, 0]][: len(batch)]
        for one, position in zip(step(variant, *beside, tables, decode=True), batch, strict=True):
            np.testing.assert_array_equal(one[0], whole[position])
    assert_close(whole.view(dtype), float64_reference(seq, variant))


@pytest.mark.parametrize("heads", [2, 6, 14, 130], ids=lambda h: f"group{h // KV_HEADS}")
def test_any_number_of_query_heads_per_kv_head(heads):
    seq, table, begin = sequence(1, heads, 64, jnp.bfloat16), [4, 8, 2], 240
    whole = step("plain", [seq], [begin], [LENGTH], [table])[0]
    part = step("plain", [seq], [begin + 9], [LENGTH], [table])[0]
    np.testing.assert_array_equal(part, whole[9:])
    for position in (240, 255, 256, 299):
        one = step("plain", [seq], [position], [position + 1], [table], decode=True)[0]
        np.testing.assert_array_equal(one[0], whole[position - begin])
    exact = float64_reference(seq, "plain")[begin:]
    assert np.abs(whole.view(jnp.bfloat16).astype(np.float64) - exact).max() < 0.1


@pytest.mark.parametrize("variant", ["plain", "window_and_cap"])
@pytest.mark.parametrize("dim", [64, 128])
def test_neighbours_and_pages_never_matter(dim, variant):
    """Mixed steps and decode batches, among sequences of NaN, in any pages, with padding rows and tokens."""
    mine = sequence(0, 4, dim, jnp.bfloat16)
    hostile = tuple(np.full_like(x, np.nan) for x in mine)
    whole = prefill(variant, mine, [1, 2, 3])
    tables = [[7, 8, 5], [4, 1, 6], [3, 2, 0]]
    mixed = step(variant, [hostile, mine, hostile], [0, 130, 9], [40, 290, 10], tables, tokens=256, rows=4)
    np.testing.assert_array_equal(mixed[1], whole[130:290])
    batch = step(variant, [hostile, mine, hostile], [39, 289, 9], [40, 290, 10], tables, decode=True, rows=8)
    np.testing.assert_array_equal(batch[1], whole[289:290])
    with pytest.raises(AssertionError):  # the comparison sees a hostile row
        np.testing.assert_array_equal(batch[0], whole[39:40])


def test_one_changed_key_is_seen_by_later_queries_alone():
    """Negative control, and the causal mask."""
    seq = sequence(0, 4, 64, jnp.bfloat16)
    keys = seq[1].copy()
    keys[150] += 1
    whole, other = (prefill("plain", s, [1, 2, 3]) for s in (seq, (seq[0], keys, seq[2])))
    np.testing.assert_array_equal(other[:150], whole[:150])
    assert (other[150:] != whole[150:]).any(axis=(1, 2)).mean() > 0.9


def test_how_many_sub_tiles_share_a_page_is_free(monkeypatch):
    seq = sequence(0, 4, 64, jnp.bfloat16)
    whole = prefill("plain", seq, [1, 2, 3])
    for most in (1, 3):
        monkeypatch.setattr(mosaic_tpu, "MOST_SUB_TILES", most)
        call.cache_clear()
        np.testing.assert_array_equal(prefill("plain", seq, [1, 2, 3]), whole)
    call.cache_clear()


def test_a_softmax_over_the_whole_batch_is_found():
    """Negative control: plain attention, one query against all of them."""
    q, k, v = (jnp.asarray(x[:, :2]) for x in sequence(0, 4, 64, jnp.float32))

    @jax.jit
    def plain(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / 8, axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights, v)

    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(bits(plain(q[:1], k, v)), bits(plain(q, k, v)[:1]))


def test_errors_name_the_remedy():
    seq = sequence(0, 4, 64, jnp.float32)
    with pytest.raises(ValueError, match="use one dtype"):
        step("plain", [(seq[0].astype(jnp.bfloat16), *seq[1:])], [0], [1], [[1, 2, 3]])
    wide = tuple(np.repeat(x, 5, axis=2) for x in seq)
    with pytest.raises(ValueError, match="use backend='xla'"):
        step("plain", [wide], [0], [1], [[1, 2, 3]])
