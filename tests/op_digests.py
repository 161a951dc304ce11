"""Prints a SHA-256 of every op's bits as JSON; tests run it under other settings of the process."""

import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.op import attention
from pallas_kernels.matmul.op import gated_matmul, matmul, pack, pack_gated
from pallas_kernels.numerics import PAGE_SIZE
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache, rope_table
from pallas_kernels.sample.op import Adjustments, SamplingRows, adjust, sample, token_logprobs

DTYPES = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))


def products(rng, dtype):
    for k, n in ((576, 960), (1000, 200)):
        w, gate = (rng.standard_normal((k, n)).astype(dtype) for _ in "wg")
        for m in (1, 40, 130):
            x = rng.standard_normal((m, k)).astype(dtype)
            yield jax.jit(partial(matmul, n=n))(x, pack(w))
            yield jax.jit(partial(gated_matmul, n=n, activation="silu"))(x, pack_gated(w, gate))
            yield jax.jit(partial(gated_matmul, n=n, activation="gelu_tanh"))(x, pack_gated(w, gate))


def norms(rng, dtype):
    for m, h in ((1, 576), (3, 2048), (64, 64), (33, 128)):
        x, weight = rng.standard_normal((m, h)).astype(dtype), rng.standard_normal(h).astype(np.float32)
        yield jax.jit(partial(rms_norm, eps=1e-6))(x, weight)


def cached(rng, dtype):
    """Prefill of 150 tokens and one decode step, through RoPE with q/k norm."""
    dim, q_heads, kv_heads = 80, 4, 2
    pages = np.zeros((4, kv_heads, PAGE_SIZE, dim), dtype)
    frequencies = 1e4 ** -(np.arange(dim // 2) / (dim // 2))
    table = rope_table(frequencies, 256)
    norm = rng.standard_normal((2, dim)).astype(np.float32)
    heads = {"num_q_heads": q_heads, "num_kv_heads": kv_heads}
    write = jax.jit(partial(rope_cache, **heads))
    k_pages = v_pages = pages
    for begin, count in ((0, 150), (150, 1)):
        qkv = rng.standard_normal((count, (q_heads + 2 * kv_heads) * dim)).astype(dtype)
        positions = np.arange(begin, begin + count, dtype=np.int32)
        q, k_pages, v_pages = write(
            qkv, k_pages, v_pages, table, positions, PAGE_SIZE + positions, q_norm=norm[0], k_norm=norm[1]
        )
        yield from (q, k_pages, v_pages)
        for options in ({}, {"window": 70, "soft_cap": 5.0}):
            attend = jax.jit(partial(attention, scale=0.1, max_query_len=count, **options))
            starts, lens = np.asarray([0, count], np.int32), np.asarray([begin + count], np.int32)
            yield attend(q, k_pages, v_pages, np.asarray([[1, 2]], np.int32), starts, lens)


def sampled(rng, _):
    for vocab in (288, 49152):
        logits = (4 * rng.standard_normal((5, vocab))).astype(np.float32)
        column = lambda *values: np.asarray(values, np.float32)  # noqa: E731
        rows = SamplingRows(
            temperature=column(0, 1, 0.7, 1.3, 2),
            top_k=np.asarray([0, 0, 40, 5, 0], np.int32),
            top_p=column(1, 1, 0.9, 0.5, 0.99),
            min_p=column(0, 0, 0, 0.05, 0.001),
            seed=np.asarray([[i, 7 * i] for i in range(5)], np.uint32),
            sample_index=np.arange(5, dtype=np.int32),
            position=np.arange(5, dtype=np.int32) * 1000,
        )
        penalties = [column(1, 1.1, 1, 0.9, 1), column(0, 0.5, 0, 0, -1), column(0, 0.1, 0.3, 0, 0)]
        ids = rng.integers(0, vocab, (5, 1)) + np.arange(4, dtype=np.int32)
        adjustments = Adjustments(
            np.repeat(np.arange(5, dtype=np.int32), 4),
            ids.reshape(-1).astype(np.int32),
            rng.standard_normal(20).astype(np.float32),
            rng.random(20) < 0.5,
            rng.integers(0, 3, 20).astype(np.int32),
            *(np.repeat(p, 4) for p in penalties),
        )
        yield from jax.jit(lambda x, rows, a: sample(adjust(x, a), rows))(logits, rows, adjustments)
        yield from jax.jit(partial(token_logprobs, top=5))(logits, np.arange(5, dtype=np.int32))


def digests() -> dict[str, str]:
    """op/dtype → SHA-256 of all its outputs on fixed inputs."""
    found = {}
    for make in (products, norms, cached, sampled):
        for dtype in DTYPES if make is not sampled else DTYPES[:1]:
            digest = hashlib.sha256()
            for out in make(np.random.default_rng(0), dtype):
                digest.update(np.asarray(out).tobytes())
            found[f"{make.__name__}/{dtype}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    print(json.dumps(digests()))
