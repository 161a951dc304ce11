"""The Hopper rope_cache without a GPU: interpreted against the xla backend and itself, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.rope_cache import mosaic_gpu_sm90 as kernel
from pallas_kernels.rope_cache import xla
from pallas_kernels.rope_cache.op import rope_table

Q_HEADS, KV_HEADS, PAGES, PAGE, LENGTH = 8, 8, 4, 128, 300


def _operands(tokens: int, head_dim: int, q_heads=Q_HEADS, kv_heads=KV_HEADS):
    rng = np.random.default_rng(head_dim)
    half = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    table = jnp.asarray(rope_table(1e4 ** (-2 * np.arange(head_dim // 2) / head_dim), LENGTH))
    where = jnp.asarray(rng.integers(0, LENGTH, tokens), jnp.int32)
    slots = jnp.asarray(rng.permutation(np.arange(PAGE, PAGES * PAGE))[:tokens], jnp.int32)
    pools = half(PAGES, kv_heads, PAGE, head_dim), half(PAGES, kv_heads, PAGE, head_dim)
    norms = [jnp.asarray(rng.normal(size=head_dim), jnp.float32) for _ in range(2)]
    return half(tokens, (q_heads + 2 * kv_heads) * head_dim), *pools, table, where, slots, norms


def _run(op, qkv, k_pages, v_pages, table, positions, slots, norms, q_heads=Q_HEADS, kv_heads=KV_HEADS):
    q_norm, k_norm = norms or (None, None)
    call = functools.partial(op, num_q_heads=q_heads, num_kv_heads=kv_heads, eps=1e-6)
    call = jax.jit(functools.partial(call, q_norm=q_norm, k_norm=k_norm))
    return [np.asarray(x).view(np.uint16) for x in call(qkv, k_pages, v_pages, table, positions, slots)]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("head_dim", "heads"), [(64, (9, 3)), (96, (8, 8)), (128, (28, 4)), (128, (32, 8)), (256, (4, 1))]
)
def test_without_norm_every_bit_is_the_xla_backends(head_dim, heads):
    *operands, _ = _operands(3, head_dim, *heads)
    with gpu_interpreter():
        got = _run(kernel.rope_cache, *operands, None, *heads)
    for ours, theirs in zip(got, _run(xla.rope_cache, *operands, None, *heads), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.interpret
def test_a_token_depends_on_itself_alone():
    qkv, k_pages, v_pages, table, positions, slots, norms = _operands(5, 128)
    hostile = qkv.at[jnp.array([0, 1, 3, 4])].set(
        jnp.array([jnp.nan, jnp.inf, 1e30, -jnp.inf], jnp.bfloat16)[:, None]
    )
    at = [2]
    with gpu_interpreter():
        whole = _run(kernel.rope_cache, qkv, k_pages, v_pages, table, positions, slots, norms)
        beside = _run(kernel.rope_cache, hostile, k_pages, v_pages, table, positions, slots, norms)
        alone = _run(
            kernel.rope_cache, qkv[2:3], k_pages, v_pages, table, positions[2:3], slots[2:3] - PAGE, norms
        )
    np.testing.assert_array_equal(beside[0][at], whole[0][at])
    np.testing.assert_array_equal(alone[0], whole[0][at])
    page, offset = divmod(int(slots[2]), PAGE)
    for pool in (1, 2):
        np.testing.assert_array_equal(beside[pool][page, :, offset], whole[pool][page, :, offset])
        np.testing.assert_array_equal(alone[pool][page - 1, :, offset], whole[pool][page, :, offset])
    assert (beside[0][[0, 1, 3, 4]] != whole[0][[0, 1, 3, 4]]).any(), "the comparison sees the hostile rows"
    untouched = np.ones((PAGES, PAGE), bool)
    untouched.reshape(-1)[np.asarray(slots)] = False
    np.testing.assert_array_equal(
        whole[1].transpose(0, 2, 1, 3)[untouched],
        np.asarray(k_pages).view(np.uint16).transpose(0, 2, 1, 3)[untouched],
    )


@pytest.mark.interpret
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_norm_and_rotation_are_close_to_float64(head_dim):
    qkv, k_pages, v_pages, table, positions, slots, norms = _operands(2, head_dim)
    with gpu_interpreter():
        got = _run(kernel.rope_cache, qkv, k_pages, v_pages, table, positions, slots, norms)[0]
    x = np.asarray(qkv, np.float64).reshape(2, -1, head_dim)[:, :Q_HEADS]
    x = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-6) * np.asarray(norms[0], np.float64)
    cos, sin = np.split(np.asarray(table, np.float64)[np.asarray(positions)][:, None], 2, axis=2)
    a, b = np.split(x, 2, axis=2)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)
    error = np.linalg.norm(got.view(jnp.bfloat16).astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < 3e-3


@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_cache_lowers_for_cuda(head_dim, heads, normed):
    *operands, norms = _operands(3, head_dim, *heads)
    q_norm, k_norm = norms if normed else (None, None)
    call = functools.partial(kernel.rope_cache, num_q_heads=heads[0], num_kv_heads=heads[1], eps=1e-6)
    call = jax.jit(functools.partial(call, q_norm=q_norm, k_norm=k_norm), donate_argnums=(1, 2))
    lowered = call.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("output_operand_alias") >= 2, "the cache is written in place"


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.float32, 64), (jnp.bfloat16, 80)])
def test_what_it_cannot_do_names_the_backend_that_can(dtype, head_dim):
    *operands, norms = _operands(1, head_dim)
    operands[:3] = (x.astype(dtype) for x in operands[:3])
    with pytest.raises(ValueError, match="use backend='xla'"):
        _run(kernel.rope_cache, *operands, norms)
