"""Gradients of the kernels: against float64, and to the same bits however the batch is cut."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdet import LLM, SamplingParams
from jaxdet.checkpoints import open_checkpoint
from jaxdet.models.registry import build_model
from jaxdet.rl import GradientSums, accumulate, logprobs, pack
from jaxdet.testing import COMMON, FAMILIES, random_model, write_tiny_model
from pallas_kernels.attention.op import attention
from pallas_kernels.matmul.op import gated_matmul, matmul, pack_gated, take_columns
from pallas_kernels.matmul.op import pack as pack_matrix
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache, rope_table
from pallas_kernels.sample.op import token_logprobs

LENGTHS = 5, 130, 64, 65, 1, 200


def bits(tree):
    return [np.asarray(x).view(f"u{x.dtype.itemsize}") for x in jax.tree.leaves(tree)]


def differing(one, other):
    return sum(int((a != b).sum()) for a, b in zip(bits(one), bits(other), strict=True))


def assert_close_to_float64(op, plain, *operands):
    """Gradients of Σ op · c by every operand, against autodiff of `plain` in float64: 1e-5 of their norm."""
    shape = jax.eval_shape(op, *operands).shape
    c = np.random.default_rng(9).standard_normal(shape)
    every = tuple(range(len(operands)))
    found = jax.jit(jax.grad(lambda *a: jnp.sum(op(*a) * c.astype(np.float32)), every))(*operands)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in operands]
        expected = [np.asarray(g) for g in jax.grad(lambda *a: jnp.sum(plain(*a) * c), every)(*wide)]
    for got, want in zip(found, expected, strict=True):
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_products(rows):
    x, w, up, bias = normal(0, rows, 80), normal(1, 80, 96), normal(2, 80, 96), normal(3, 96)
    residual = normal(4, rows, 96)
    assert_close_to_float64(
        lambda x, w, b, r: matmul(x, pack_matrix(w), n=96, bias=b, residual=r),
        lambda x, w, b, r: x @ w + b + r,
        x,
        w,
        bias,
        residual,
    )
    for activation, plain in (("silu", jax.nn.silu), ("gelu_tanh", jax.nn.gelu)):
        assert_close_to_float64(
            lambda x, w, u, a=activation: gated_matmul(x, pack_gated(w, u), n=96, activation=a),
            lambda x, w, u, act=plain: act(x @ w) * (x @ u),
            x,
            w,
            up,
        )


def with_dead_rows(x, dy):
    """dy without two of its rows, and x with NaN there."""
    dead = np.array([3, 64])
    dy, poisoned = dy.copy(), x.copy()
    dy[dead], poisoned[dead] = 0, np.nan
    return dy, poisoned


def test_rows_without_a_gradient_add_nothing_even_if_they_are_nan():
    """To a matrix's gradient; of 70 rows two are NaN. With a gradient they are seen."""
    x, w, dy = normal(0, 70, 80), pack_matrix(normal(1, 80, 96)), np.ones((70, 96), np.float32)
    dy, poisoned = with_dead_rows(x, dy)

    @jax.jit
    def dw(x, dy):
        return jax.vjp(lambda w: matmul(x, w, n=96), w)[1](dy)[0]

    assert differing(dw(poisoned, dy), dw(x, dy)) == 0
    assert np.isnan(dw(poisoned, np.ones_like(dy))).any()


def test_a_norm_sees_no_rows_without_a_gradient():
    """Neither its weight's gradient nor theirs, be they NaN."""
    x, w, dy = normal(0, 70, 96), normal(1, 96), normal(2, 70, 96)
    dy, poisoned = with_dead_rows(x, dy)

    @jax.jit
    def gradients(x, dy):
        return jax.vjp(lambda x, w: rms_norm(x, w, eps=1e-6), x, w)[1](dy)

    assert [differing(a, b) for a, b in zip(gradients(poisoned, dy), gradients(x, dy), strict=True)] == [0, 0]
    assert np.isnan(gradients(poisoned, np.ones_like(dy))[1]).any()


def test_repeated_ids_of_an_embedding():
    ids = np.random.default_rng(0).integers(0, 7, 150).astype(np.int32)
    assert_close_to_float64(
        lambda w: take_columns(pack_matrix(w), ids, 80), lambda w: w[:, ids].T, normal(1, 80, 96)
    )


def test_norm_and_logprob():
    x, w = normal(0, 70, 96), normal(1, 96)
    assert_close_to_float64(
        lambda x, w: rms_norm(x, w, eps=1e-5),
        lambda x, w: x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-5) * w,
        x,
        w,
    )
    ids = np.random.default_rng(2).integers(0, 96, 70).astype(np.int32)
    assert_close_to_float64(
        lambda x: token_logprobs(x, jnp.asarray(ids), top=1)[0],
        lambda x: jax.nn.log_softmax(x)[jnp.arange(70), ids],
        x,
    )


def test_rope_and_cache():
    """70 tokens over two pages, 4 query heads and 2 KV heads, with q/k norm."""
    tokens, dim = 70, 16
    at, slots = np.arange(tokens, dtype=np.int32), np.arange(100, 100 + tokens, dtype=np.int32) + 128
    table = jnp.asarray(rope_table(10000.0 ** -(np.arange(0, dim, 2) / dim), 128))
    empty = jnp.zeros((3, 2, 128, dim), jnp.float32)

    def ours(qkv, q_norm, k_norm):
        q, *pages = rope_cache(
            qkv, empty, empty, table, at, slots, num_q_heads=4, num_kv_heads=2, q_norm=q_norm, k_norm=k_norm
        )
        return jnp.concatenate([q, *(x[slots // 128, :, slots % 128] for x in pages)], axis=1)

    def plain(qkv, q_norm, k_norm):
        q, k, v = jnp.split(qkv.reshape(tokens, -1, dim), [4, 6], axis=1)
        cos, sin = jnp.split(jnp.asarray(np.asarray(table), jnp.float64)[:tokens, None], 2, axis=-1)

        def turn(x, norm):
            x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * norm
            a, b = jnp.split(x, 2, axis=-1)
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        return jnp.concatenate([turn(q, q_norm), turn(k, k_norm), v], axis=1)

    assert_close_to_float64(ours, plain, normal(0, tokens, 8 * dim), normal(1, dim), normal(2, dim))


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (100, None), (None, 2.0)])
def test_attention(window, soft_cap):
    """One sequence of 200 tokens on two pages, 4 query heads over 2 KV heads."""
    tokens, dim = 200, 16
    q, k, v = normal(0, tokens, 4, dim), normal(1, 3, 2, 128, dim), normal(2, 3, 2, 128, dim)
    tables, starts, lens = np.array([[2, 1]]), np.array([0, tokens]), np.array([tokens])

    def plain(q, k, v):
        k, v = (jnp.repeat(jnp.concatenate([x[2], x[1]], 1)[:, :tokens], 2, 0) for x in (k, v))
        scores = jnp.einsum("thd,hsd->hts", q, k) * 0.25
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        ahead = np.arange(tokens)[:, None] - np.arange(tokens)
        visible = (ahead >= 0) & (ahead < (window or tokens))
        probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return jnp.einsum("hts,hsd->thd", probs, v)

    def ours(q, k, v):
        options = dict(scale=0.25, window=window, soft_cap=soft_cap, max_query_len=tokens)
        return attention(q, k, v, tables, starts, lens, **options)

    assert_close_to_float64(ours, plain, q, k, v)


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("gemma3_text", "bfloat16")])
def test_micro_batches_never_matter(family, dtype, monkeypatch):
    """The sums have one bit pattern for three sizes, rematerialised or not, logits kept or not; in another order
    they have another."""
    config = {"model_type": family} | COMMON | FAMILIES[family]
    model = random_model(config, dtype=jnp.dtype(dtype), backend="xla", max_model_len=512)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(0)
    sequences = [
        (rng.integers(0, 259, n).tolist(), rng.standard_normal(n).astype(np.float32)) for n in LENGTHS
    ]

    def objective(values, _, weights):
        return jnp.sum(values * weights), None

    def sums(size, sequences, remat=False):
        @jax.jit
        def step(params, total, micro, weights):
            return accumulate(nnx.merge(graph, params, rest), total, micro, objective, weights, remat=remat)[
                0
            ]

        total = GradientSums.zeros(params)
        left = iter(sequences)
        for micro, where in pack([ids for ids, _ in sequences], size):
            weights = np.zeros(micro.targets.shape, np.float32)
            for rows in where:
                weights[rows] = next(left)[1]
            total = step(params, total, micro, weights)
        return total

    whole = sums(1024, sequences)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole))
    assert differing(whole, sums(256, sequences)) == 0
    assert differing(whole, sums(512, sequences, remat=True)) == 0
    assert differing(whole, sums(1024, sequences[::-1])) > 0, "the comparison would see another order"
    module = importlib.import_module("jaxdet.rl.logprobs")
    monkeypatch.setattr(module, "KEEP_LOGITS", {"xla"})
    monkeypatch.setattr(module, "HEAD_ROWS", {"xla": 384})  # the last of three blocks is shorter
    assert differing(whole, sums(1024, sequences)) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trainer_sees_the_samplers_logprobs(tmp_path, dtype):
    """Sampled at temperature 1, in ragged batches with a cached prefix: equal to the last bit."""
    folder = write_tiny_model(tmp_path / "model")
    llm = LLM(folder, dtype=dtype, max_model_len=512)
    shared = list(range(3, 140))
    prompts = [shared, [5], [*shared, 9, 8], list(range(50))]
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=40, logprobs=0, ignore_eos=True)
    sampled = [
        (
            list(out.prompt_token_ids),
            list(c.token_ids),
            [lp[t].logprob for t, lp in zip(c.token_ids, c.logprobs, strict=True)],
        )
        for out in llm.generate(prompts, params, use_tqdm=False)
        for c in out.outputs
    ]
    checkpoint = open_checkpoint(folder)
    model = build_model(
        checkpoint, checkpoint.config, dtype=jnp.dtype(dtype), backend=None, max_model_len=512
    )
    graph, state = nnx.split(model)
    score = jax.jit(lambda state, micro: logprobs(nnx.merge(graph, state), micro))
    other = jax.tree.map(lambda x: x * jnp.asarray(1.01, x.dtype), state)
    compared = moved = 0
    for size in (256, 1024):
        left = iter(sampled)
        for micro, where in pack([p + c for p, c, _ in sampled], size):
            values, wrong = np.asarray(score(state, micro)), np.asarray(score(other, micro))
            for rows in where:
                prompt, _, expected = next(left)
                found = values[rows][len(prompt) - 1 : -1]
                np.testing.assert_array_equal(found.view("u4"), np.asarray(expected, np.float32).view("u4"))
                compared += len(found)
                moved += np.count_nonzero(wrong[rows][len(prompt) - 1 : -1] != found)
    assert compared == 2 * 8 * 40
    assert moved > 0, "the comparison would see other weights"


@pytest.mark.parametrize(
    "lengths, limit, sizes",
    [
        ([3], 1024, [64]),
        ([64, 65], 1024, [256]),
        ([64, 65], 192, [192]),
        ([700], 1000, [1024]),
        ([500, 500, 20], 1024, [1024, 64]),
        ([10, 10], 64, [64, 64]),
    ],
)
def test_a_micro_batch_is_no_longer_than_it_must_be(lengths, limit, sizes):
    packed = pack([list(range(n)) for n in lengths], limit)
    assert [len(micro.targets) for micro, _ in packed] == sizes
    assert [rows.stop - rows.start for _, where in packed for rows in where] == lengths
    assert sum(int(micro.scored.sum()) for micro, _ in packed) == sum(lengths) - len(lengths)
    for micro, _ in packed:
        batch = micro.batch
        assert batch.query_alignment == 64
        assert not (batch.query_start[:-1] % batch.query_alignment).any(), "what it promises to the kernels"
