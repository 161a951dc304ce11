"""The TPU rope_cache, interpreted: tokens are independent, only their slots are written, results close to float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_rows import HOSTILE, bits, error, random

from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.rope_cache import mosaic_tpu
from pallas_kernels.rope_cache.op import rope_cache, rope_table

pytestmark = pytest.mark.interpret
Q_HEADS, KV_HEADS, PAGES, PAGE, LENGTH = 4, 2, 5, 128, 300
DTYPES = [jnp.float32, jnp.bfloat16]


def operands(tokens, dim, dtype, normed):
    table = rope_table(1e4 ** (-2 * np.arange(dim // 2) / dim), LENGTH)
    pools = [random(seed, (PAGES, KV_HEADS, PAGE, dim), dtype) for seed in (1, 2)]
    norms = [random(seed, dim, np.float32) for seed in (3, 4)] if normed else [None, None]
    where = np.random.default_rng(5).integers(0, LENGTH, tokens).astype(np.int32)
    return random(0, (tokens, (Q_HEADS + 2 * KV_HEADS) * dim), dtype), *pools, table, where, norms


@functools.cache
def call(backend):
    static = ("num_q_heads", "num_kv_heads", "eps", "backend")
    heads = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS}
    return functools.partial(jax.jit(rope_cache, static_argnames=static), **heads, eps=1e-6, backend=backend)


def run(qkv, k_pages, v_pages, table, where, norms, slots, backend="mosaic_tpu"):
    with tpu_interpreter():
        out = call(backend)(
            qkv, k_pages, v_pages, table, where, np.int32(slots), q_norm=norms[0], k_norm=norms[1]
        )
        return [np.asarray(x) for x in out]


def read(pool, slots):
    return pool[slots // PAGE, :, slots % PAGE]


def permuted(tokens):
    """Slots in no order, several tokens to a group of 8 or 16, none in the trash page."""
    return np.random.default_rng(7).permutation(np.arange(PAGE, PAGE + 2 * tokens))[:tokens]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "normed"), [(64, False), (64, True), (96, False), (128, False), (128, True), (256, True)]
)
def test_a_token_depends_on_itself_alone(dim, normed, dtype):
    """Whatever the number of tokens and their neighbours, and wherever it is written."""
    tokens = 70
    qkv, k_pages, v_pages, table, where, norms = operands(tokens, dim, dtype, normed)
    slots = permuted(tokens)
    whole = run(qkv, k_pages, v_pages, table, where, norms, slots)
    for pool, before in zip(whole[1:], (k_pages, v_pages), strict=True):
        rest = np.setdiff1d(np.arange(PAGES * PAGE), slots)
        np.testing.assert_array_equal(bits(read(pool, rest)), bits(read(before, rest)))
    hostile = qkv.copy()
    hostile[1::2] = np.resize(HOSTILE, (tokens // 2, 1)).astype(dtype)
    beside = run(hostile, k_pages, v_pages, table, where, norms, slots)
    at = np.arange(0, tokens, 2)
    few = np.array([66, 2, 40])
    there = np.array([3 * PAGE, PAGE + 77, 4 * PAGE + 5])
    alone = run(qkv[few], k_pages, v_pages, table, where[few], norms, there)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(bits(beside[0]), bits(whole[0]))
    np.testing.assert_array_equal(bits(beside[0][at]), bits(whole[0][at]))
    np.testing.assert_array_equal(bits(alone[0]), bits(whole[0][few]))
    for pool in (1, 2):
        mine = bits(read(whole[pool], slots))
        np.testing.assert_array_equal(bits(read(beside[pool], slots[at])), mine[at])
        np.testing.assert_array_equal(bits(read(alone[pool], there)), mine[few])


@pytest.mark.parametrize("dim", [64, 128])
def test_padding_goes_to_the_trash_page(dim):
    """Forty tokens of padding share one slot; the page that a real token goes to is read and written whole."""
    tokens = 45
    qkv, k_pages, v_pages, table, where, norms = operands(tokens, dim, jnp.bfloat16, True)
    qkv[5:] = np.nan
    slots = np.array([2 * PAGE, 2 * PAGE + 1, 3 * PAGE + 127, PAGE + 8, 4 * PAGE + 64] + [0] * (tokens - 5))
    padded = run(qkv, k_pages, v_pages, table, where, norms, slots)
    alone = run(qkv[:5], k_pages, v_pages, table, where[:5], norms, slots[:5])
    np.testing.assert_array_equal(bits(padded[0][:5]), bits(alone[0]))
    for ours, theirs in zip(padded[1:], alone[1:], strict=True):
        np.testing.assert_array_equal(bits(ours[1:]), bits(theirs[1:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 96, 256])
def test_norm_and_rotation_are_close_to_float64(dim, dtype):
    tokens = 9
    qkv, k_pages, v_pages, table, where, norms = operands(tokens, dim, dtype, True)
    slots = permuted(tokens)
    q, k_pool, v_pool = run(qkv, k_pages, v_pages, table, where, norms, slots)
    heads = qkv.astype(np.float64).reshape(tokens, -1, dim)
    cos, sin = np.split(table.astype(np.float64)[where][:, None], 2, axis=2)

    def exact(x, weight):
        x = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-6) * weight
        a, b = np.split(x, 2, axis=2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    limit = jnp.finfo(dtype).eps + 1e-6
    for found, x, weight in (
        (q, heads[:, :Q_HEADS], norms[0]),
        (read(k_pool, slots), heads[:, Q_HEADS:-KV_HEADS], norms[1]),
    ):
        assert error("rope_cache", found, exact(x, weight)) < limit
    values = qkv.reshape(tokens, -1, dim)[:, -KV_HEADS:]
    np.testing.assert_array_equal(bits(read(v_pool, slots)), bits(values))


def test_the_tile_is_a_function_of_the_model():
    assert mosaic_tpu.tile_tokens(8, PAGE, 128, jnp.bfloat16) == 32
    assert mosaic_tpu.tile_tokens(32, PAGE, 64, jnp.float32) == 8
    *some, norms = operands(1, 64, jnp.float32, False)
    with pytest.raises(ValueError, match="use one dtype"):
        run(some[0].astype(jnp.bfloat16), *some[1:], norms, np.array([PAGE]))
    pools = [x[:, :, :64] for x in some[1:3]]
    with pytest.raises(ValueError, match="mosaic_tpu takes 128"):
        run(some[0], *pools, *some[3:], norms, np.array([PAGE]))
