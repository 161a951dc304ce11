"""Hopper attention and RMSNorm without a GPU: lowered for CUDA; the bits are compared where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import mosaic_gpu_sm90 as kernel
from pallas_kernels.rms_norm import mosaic_gpu_sm90 as norm

OPTIONS = {"scale": 0.1, "window": None, "soft_cap": None}


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("option", [{}, {"window": 200, "soft_cap": 30.0}], ids=["plain", "window and cap"])
def test_attention_lowers_for_cuda(head_dim, queries, option):
    tokens, sequences = (4, 4) if queries == 1 else (300, 3)
    half, int32 = jnp.bfloat16, jnp.int32
    pages = jax.ShapeDtypeStruct((9, 2, 128, head_dim), half)
    arguments = (
        jax.ShapeDtypeStruct((tokens, 8, head_dim), half),
        pages,
        pages,
        jax.ShapeDtypeStruct((sequences, 8), int32),
        jax.ShapeDtypeStruct((sequences + 1,), int32),
        jax.ShapeDtypeStruct((sequences,), int32),
    )
    call = functools.partial(kernel.attention, **OPTIONS | option, max_query_len=queries)
    jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("size", [576, 4096])
def test_rms_norm_lowers_for_cuda(size):
    x, weight = jax.ShapeDtypeStruct((7, size), jnp.bfloat16), jax.ShapeDtypeStruct((size,), jnp.float32)
    call = jax.jit(functools.partial(norm.rms_norm, eps=1e-6))
    call.trace(x, weight).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.float32, 128), (jnp.bfloat16, 80)])
def test_what_it_cannot_do_names_the_backend_that_can(dtype, head_dim):
    q, pages = jnp.zeros((1, 8, head_dim), dtype), jnp.zeros((2, 2, 128, head_dim), dtype)
    index = jnp.zeros((1, 1), jnp.int32), jnp.arange(2), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="use backend='xla'"):
        kernel.attention(q, pages, pages, *index, **OPTIONS, max_query_len=1)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("option", [{}, {"window": 200}, {"soft_cap": 30.0}], ids=str)
def test_decode_chunks_and_prefill_give_one_bit_pattern(head_dim, option):
    length, heads, kv_heads, count = 700, 8, 2, 6
    keys = jax.random.split(jax.random.key(0), 3)
    q = (jax.random.normal(keys[0], (length, heads, head_dim)) * 2).astype(jnp.bfloat16)
    order = np.random.default_rng(0).permutation(count + 3)[:count]
    pools = []
    for key in keys[1:]:
        values = jax.random.normal(key, (length, kv_heads, head_dim)).astype(jnp.bfloat16)
        padded = jnp.full((count * 128, kv_heads, head_dim), jnp.nan, jnp.bfloat16).at[:length].set(values)
        paged = padded.reshape(count, 128, kv_heads, head_dim).transpose(0, 2, 1, 3)
        pool = jnp.full((count + 3, kv_heads, 128, head_dim), jnp.nan, jnp.bfloat16)
        pools.append(pool.at[order].set(paged))

    def run(q, lens, counts, longest):
        tables = jnp.tile(jnp.asarray(order, jnp.int32)[None], (len(lens), 1))
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
        call = functools.partial(kernel.attention, **OPTIONS | option, max_query_len=longest)
        out = jax.jit(call)(q, *pools, tables, starts, jnp.asarray(lens, jnp.int32))
        return np.asarray(out).view(np.uint16)

    whole = run(q, [length], [length], length)
    at = np.array([0, 1, 127, 128, 129, 511, 512, 513, length - 1])
    np.testing.assert_array_equal(run(q[at], at + 1, [1] * len(at), 1), whole[at])
    for chunk in (7, 100, 512):
        for start in range(0, length - chunk, 3 * chunk):
            part = run(q[start : start + chunk], [start + chunk], [chunk], chunk)
            np.testing.assert_array_equal(part, whole[start : start + chunk])
