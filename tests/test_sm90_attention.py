"""Hopper attention and RMSNorm without a GPU: interpreted on small shapes, lowered for CUDA on real ones.

The interpreter has its own order of sums, so path invariance is shown there for its own bits; the hardware's are
compared where there is one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import decode_sm90
from pallas_kernels.attention import mosaic_gpu_sm90 as kernel
from pallas_kernels.attention.segments_sm90 import SEGMENT
from pallas_kernels.backend import rows_are_free
from pallas_kernels.compat import gpu_interpreter
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
        jax.ShapeDtypeStruct((sequences, 2 * SEGMENT // 128), int32),
        jax.ShapeDtypeStruct((sequences + 1,), int32),
        jax.ShapeDtypeStruct((sequences,), int32),
    )
    call = functools.partial(kernel.attention, **OPTIONS | option, max_query_len=queries)
    jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("rows", [7, 1024])
@pytest.mark.parametrize("size", [576, 4096])
def test_rms_norm_lowers_for_cuda(size, rows):
    x, weight = jax.ShapeDtypeStruct((rows, size), jnp.bfloat16), jax.ShapeDtypeStruct((size,), jnp.float32)
    call = jax.jit(functools.partial(norm.rms_norm, eps=1e-6))
    call.trace(x, weight).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.float32, 128), (jnp.bfloat16, 80)])
def test_what_it_cannot_do_names_the_backend_that_can(dtype, head_dim):
    q, pages = jnp.zeros((1, 8, head_dim), dtype), jnp.zeros((2, 2, 128, head_dim), dtype)
    index = jnp.zeros((1, 1), jnp.int32), jnp.arange(2), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="use backend='xla'"):
        kernel.attention(q, pages, pages, *index, **OPTIONS, max_query_len=1)


class Sequence:
    """One sequence's queries, keys and values, its pages shuffled in a pool of NaN."""

    def __init__(self, length: int, heads: int, kv_heads: int, head_dim: int):
        keys, count = jax.random.split(jax.random.key(0), 3), -(-length // 128)
        self.q = (jax.random.normal(keys[0], (length, heads, head_dim)) * 2).astype(jnp.bfloat16)
        self.order = np.random.default_rng(0).permutation(count + 3)[:count]
        self.k, self.v = (
            jax.random.normal(key, (length, kv_heads, head_dim)).astype(jnp.bfloat16) for key in keys[1:]
        )
        self.pools = []
        for values in (self.k, self.v):
            padded = (
                jnp.full((count * 128, kv_heads, head_dim), jnp.nan, jnp.bfloat16).at[:length].set(values)
            )
            paged = padded.reshape(count, 128, kv_heads, head_dim).transpose(0, 2, 1, 3)
            pool = jnp.full((count + 3, kv_heads, 128, head_dim), jnp.nan, jnp.bfloat16)
            self.pools.append(pool.at[self.order].set(paged))

    def run(self, q, lens, counts, longest, **option):
        """Bits of attention for sequences of `lens` keys whose last `counts` tokens are the rows of q."""
        tables = jnp.tile(jnp.asarray(self.order, jnp.int32)[None], (len(lens), 1))
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)
        call = functools.partial(kernel.attention, **OPTIONS | option, max_query_len=longest)
        out = jax.jit(call)(q, *self.pools, tables, starts, jnp.asarray(lens, jnp.int32))
        return np.asarray(out).view(np.uint16)

    def exact(self, at: int, window: int | None) -> np.ndarray:
        """Attention of the query at position `at`, in float64."""
        q, k, v = (np.asarray(x, np.float64) for x in (self.q[at], self.k, self.v))
        seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
        k, v = (np.repeat(x[seen], q.shape[0] // x.shape[1], axis=1) for x in (k, v))
        scores = np.einsum("hd,khd->hk", q, k) * OPTIONS["scale"]
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.einsum("hk,khd->hd", p / p.sum(axis=1, keepdims=True), v)


@pytest.mark.interpret
@pytest.mark.skipif(
    not rows_are_free(), reason="interpreted products are XLA's, whose order has the rows in it here"
)
@pytest.mark.parametrize(
    ("head_dim", "length", "option"),
    [(64, SEGMENT + 18, {}), (128, 200, {"window": 70})],
    ids=["plain", "window"],
)
def test_interpreted_decode_chunk_and_prefill_agree(head_dim, length, option):
    sequence = Sequence(length, 2, 1, head_dim)
    at = np.array([0, 127, length - 1])
    with gpu_interpreter():
        whole = sequence.run(sequence.q, [length], [length], length, **option)
        decoded = sequence.run(sequence.q[at], at + 1, [1] * 3, 1, **option)
        nan = jnp.full((40, 2, head_dim), jnp.nan, jnp.bfloat16)
        mixed = jnp.concatenate([nan, sequence.q[-60:]])
        chunk = sequence.run(mixed, [length, length], [40, 60], 60, **option)[40:]
    np.testing.assert_array_equal(decoded, whole[at])
    np.testing.assert_array_equal(chunk, whole[-60:])
    assert (decoded[1] != whole[at[2]]).any(), "the comparison tells two rows apart"
    exact = np.stack([sequence.exact(i, option.get("window")) for i in at])
    error = np.linalg.norm(decoded.view(jnp.bfloat16).astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < 5e-3


@pytest.mark.interpret
def test_interpreted_decode_of_whole_sequences_and_of_segments_agree(monkeypatch):
    length = SEGMENT + 18
    sequence, at = Sequence(length, 3, 1, 64), np.array([length - 1, 2, SEGMENT - 1, SEGMENT])
    call = lambda: sequence.run(sequence.q[at], at + 1, [1] * len(at), 1)  # noqa: E731
    merged_later = _decode_traced_anew(call)
    monkeypatch.setattr(decode_sm90, "CTAS", 1)
    monkeypatch.setattr(decode_sm90, "SHARE", 1)
    np.testing.assert_array_equal(_decode_traced_anew(call), merged_later)
    forget = lambda best, total, m, mass, _: (jnp.zeros_like(m), jnp.ones_like(m), m, mass)  # noqa: E731
    monkeypatch.setattr(decode_sm90.softmax, "shares", forget)
    assert (_decode_traced_anew(call) != merged_later).any(), "a merge that forgets is seen"


def _decode_traced_anew(call):
    for kernel_of in (decode_sm90._kernel, decode_sm90._merge_kernel):
        kernel_of.cache_clear()
    with gpu_interpreter():
        out = call()
    decode_sm90._kernel.cache_clear()
    return out


@pytest.mark.interpret
def test_interpreted_rms_norm_row_depends_on_itself_alone(monkeypatch):
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.normal(size=(6, 576)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=576), jnp.float32),
    )

    def run(x):
        with gpu_interpreter():
            return np.asarray(norm.rms_norm(x, weight, eps=1e-6)).view(np.uint16)

    full, hostile = run(x), run(x.at[::2].set(jnp.inf))
    np.testing.assert_array_equal(run(x[1:2]), full[1:2])
    monkeypatch.setattr(norm, "PAIRED", range(6, 7))
    np.testing.assert_array_equal(run(x), full)
    np.testing.assert_array_equal(hostile[1::2], full[1::2])
    assert (hostile[::2] != full[::2]).any(), "the comparison sees the hostile rows"
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * np.asarray(weight, np.float64)
    error = np.linalg.norm(full.view(jnp.bfloat16).astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a Hopper GPU")
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("option", [{}, {"window": 200}, {"soft_cap": 30.0}], ids=str)
def test_decode_chunks_and_prefill_give_one_bit_pattern(head_dim, option):
    length = SEGMENT + 200
    sequence = Sequence(length, 8, 2, head_dim)
    whole = sequence.run(sequence.q, [length], [length], length, **option)
    at = np.array([0, 1, 127, 128, 129, SEGMENT - 1, SEGMENT, SEGMENT + 1, length - 1])
    decoded = sequence.run(sequence.q[at], at + 1, [1] * len(at), 1, **option)
    np.testing.assert_array_equal(decoded, whole[at])
    for chunk in (7, 100, 512):
        for start in range(0, length - chunk, 3 * chunk):
            rows = sequence.q[start : start + chunk]
            part = sequence.run(rows, [start + chunk], [chunk], chunk, **option)
            np.testing.assert_array_equal(part, whole[start : start + chunk])
