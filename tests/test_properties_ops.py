"""Random shapes, dtypes, neighbours and cuts: every op keeps a row's bits (I1, batch) and a sequence's (I2, path)."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention.op import attention
from pallas_kernels.matmul.op import gated_matmul, matmul, pack, pack_gated
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.sample.op import token_logprobs

prove = settings(max_examples=10, derandomize=True, deadline=None, database=None)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"]).map(jnp.dtype)
seeds = st.integers(0, 2**32 - 1)


def bits(x):
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def poison(rng, shape, dtype):
    with np.errstate(over="ignore"):
        return rng.choice([np.nan, np.inf, -np.inf, 1e30, -0.0], shape).astype(dtype)


def assert_row_alone(f, row, count, rng):
    """Row `row` among `count − 1` poisoned ones, at a random position, is what it is alone."""
    x = poison(rng, (count, row.shape[0]), row.dtype)
    at = rng.integers(count)
    x[at] = row
    for found, alone in zip(jax.tree.leaves(f(x)), jax.tree.leaves(f(row[None])), strict=True):
        np.testing.assert_array_equal(bits(found)[at], bits(alone)[0])


@prove
@given(seeds, dtypes, st.integers(1, 1300), st.integers(1, 300), st.integers(2, 300))
def test_matmul(seed, dtype, k, n, count):
    rng = np.random.default_rng(seed)
    w = pack(jnp.asarray(rng.standard_normal((k, n)).astype(dtype)))
    f = jax.jit(partial(matmul, n=n, out_dtype=jnp.float32))
    assert_row_alone(lambda x: f(x, w), rng.standard_normal(k).astype(dtype), count, rng)


@prove
@given(
    seeds,
    dtypes,
    st.integers(1, 700),
    st.integers(1, 200),
    st.integers(2, 140),
    st.sampled_from(["silu", "gelu_tanh"]),
)
def test_gated_matmul(seed, dtype, k, n, count, activation):
    rng = np.random.default_rng(seed)
    gate, up = (jnp.asarray(rng.standard_normal((k, n)).astype(dtype)) for _ in "gu")
    w = pack_gated(gate, up)
    f = jax.jit(partial(gated_matmul, n=n, activation=activation))
    assert_row_alone(lambda x: f(x, w), rng.standard_normal(k).astype(dtype), count, rng)


@prove
@given(seeds, dtypes, st.integers(1, 3000), st.integers(2, 200))
def test_rms_norm(seed, dtype, size, count):
    rng = np.random.default_rng(seed)
    f = jax.jit(partial(rms_norm, weight=jnp.asarray(rng.standard_normal(size, np.float32)), eps=1e-6))
    assert_row_alone(f, rng.standard_normal(size).astype(dtype), count, rng)


@settings(prove, max_examples=6)
@given(seeds, st.integers(2, 20000), st.integers(2, 40))
def test_token_logprobs(seed, vocab, count):
    rng = np.random.default_rng(seed)
    f = jax.jit(lambda x: token_logprobs(x, jnp.full(x.shape[0], vocab // 2, jnp.int32), top=2))
    assert_row_alone(f, rng.standard_normal(vocab, np.float32), count, rng)


@functools.cache
def attend(max_query_len, window, soft_cap):
    return jax.jit(
        partial(attention, scale=0.125, max_query_len=max_query_len, window=window, soft_cap=soft_cap)
    )


@settings(prove, max_examples=6)
@given(
    seeds,
    dtypes,
    st.sampled_from([16, 32, 64, 80, 128, 192, 256]),
    st.integers(1, 16),
    st.integers(2, 2 * PAGE_SIZE + 40),
    st.sampled_from([None, 1, 50, 128]),
    st.sampled_from([None, 20.0]),
    st.data(),
)
def test_attention(seed, dtype, dim, group, length, window, soft_cap, data):
    """Random cuts of a sequence, each computed beside a poisoned sequence, give one prefill's bits.

    So they do with one key and one value poisoned, which rows before them don't feel.
    """
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((length, h, dim)).astype(dtype) for h in (2 * group, 2, 2))
    table = rng.permutation(6)[:3].astype(np.int32)

    def run(begin, end, mate):
        pools = [poison(rng, (6, 2, PAGE_SIZE, dim), dtype) for _ in "kv"]
        for pool, rows in zip(pools, (k, v), strict=True):
            at = np.arange(end)
            pool[table[at // PAGE_SIZE], :, at % PAGE_SIZE] = rows[:end]
        decode = end - begin == 1
        rows = [q[begin:end], *([poison(rng, (1, 2 * group, dim), dtype)] if mate else [])]
        tokens = sum(map(len, rows)) if decode else 384
        x = np.concatenate([*rows, np.zeros((tokens - sum(map(len, rows)), 2 * group, dim), dtype)])
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
        tables = np.stack([table, rng.permutation(6)[:3]][: len(rows)]).astype(np.int32)
        lens = np.asarray([end, int(rng.integers(1, 300))][: len(rows)], np.int32)
        out = attend(1 if decode else tokens, window, soft_cap)(x, *pools, tables, starts, lens)
        return bits(out)[: end - begin]

    def assert_cuts_agree():
        whole = run(0, length, False)
        for _ in range(2):
            begin = data.draw(st.integers(0, length - 1))
            end = data.draw(st.integers(begin + 1, length))
            np.testing.assert_array_equal(run(begin, end, True), whole[begin:end])
        last = data.draw(st.integers(0, length - 1))
        np.testing.assert_array_equal(run(last, last + 1, True), whole[last : last + 1])
        return whole

    clean = assert_cuts_agree()
    first = length
    for rows in (k, v):
        at = data.draw(st.integers(0, length - 1))
        rows[at, 0, rng.integers(dim)] = poison(rng, (), dtype)
        first = min(first, at)
    np.testing.assert_array_equal(assert_cuts_agree()[:first], clean[:first])


def test_plain_products_fail_this():
    """Negative control: XLA's own dot doesn't keep a row's bits."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((576, 960), np.float32)
    plain = jax.jit(lambda x: jnp.dot(x, w, precision="highest"))
    row, failed = rng.standard_normal(576, np.float32), 0
    for count in (2, 8, 40, 100):
        try:
            assert_row_alone(plain, row, count, rng)
        except AssertionError:
            failed += 1
    assert failed
