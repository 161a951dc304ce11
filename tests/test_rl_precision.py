"""How exact gradients are: float32 against finite differences in float64, bfloat16 beside plain JAX's own autodiff."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.models.registry import build_model
from jaxdet.rl import logprobs, pack
from jaxdet.testing import write_tiny_model
from pallas_kernels import registry
from pallas_kernels.attention.op import attention
from pallas_kernels.matmul import op as matmul_op
from pallas_kernels.rms_norm.op import rms_norm
from pallas_kernels.rope_cache.op import rope_cache, rope_table
from pallas_kernels.sample.op import token_logprobs

IN_FLOAT32 = 1e-5
"""Relative error of a gradient."""
BESIDE_PLAIN = 1.1
"""In bfloat16 our error may be this much of plain JAX's."""
TOKENS, DIM = 200, 16
IDS = np.random.default_rng(1).integers(0, 96, TOKENS).astype(np.int32)
ANGLES = rope_table(10000.0 ** -(np.arange(0, DIM, 2) / DIM), 256)
POSITIONS = np.arange(TOKENS, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """An op beside what anybody would write; `wide` operands are float32 where others are bfloat16."""

    ours: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    shapes: tuple[tuple[int, ...], ...]
    wide: tuple[int, ...] = ()


def _dot(x, w):
    return jnp.dot(x, w).astype(x.dtype)


def _wide(x):
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _norm(x, weight):
    y = _wide(x)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5) * weight).astype(x.dtype)


def _rope_cache(qkv, q_norm, k_norm):
    empty = jnp.zeros((3, 2, 128, DIM), qkv.dtype)
    slots = POSITIONS + 128
    q, *pages = rope_cache(
        qkv,
        empty,
        empty,
        jnp.asarray(ANGLES),
        POSITIONS,
        slots,
        num_q_heads=4,
        num_kv_heads=2,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=1e-5,
    )
    return jnp.concatenate([q, *(x[slots // 128, :, slots % 128] for x in pages)], axis=1)


def _plain_rope_cache(qkv, q_norm, k_norm):
    q, k, v = jnp.split(qkv.reshape(TOKENS, -1, DIM), [4, 6], axis=1)
    cos, sin = (a.astype(_wide(qkv).dtype) for a in jnp.split(jnp.asarray(ANGLES)[:TOKENS, None], 2, axis=-1))

    def turn(x, norm):
        a, b = jnp.split(_wide(_norm(x, norm)), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

    return jnp.concatenate([turn(q, q_norm), turn(k, k_norm), v], axis=1)


def _attention(window, soft_cap):
    def ours(q, k, v):
        pages = [jnp.pad(x, ((0, 56), (0, 0), (0, 0))).reshape(2, 128, 2, DIM) for x in (k, v)]
        pages = [jnp.pad(x.transpose(0, 2, 1, 3), ((1, 0), (0, 0), (0, 0), (0, 0))) for x in pages]
        tables, starts, lens = np.array([[1, 2]]), np.array([0, TOKENS]), np.array([TOKENS])
        options = dict(scale=0.25, window=window, soft_cap=soft_cap, max_query_len=TOKENS)
        return attention(q, *pages, tables, starts, lens, **options)

    def plain(q, k, v):
        grouped = q.reshape(TOKENS, 2, 2, DIM)
        accumulator = _wide(q).dtype
        scores = 0.25 * jnp.einsum("tkgd,skd->kgts", grouped, k, preferred_element_type=accumulator)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        ahead = POSITIONS[:, None] - POSITIONS
        visible = (ahead >= 0) & (ahead < (window or TOKENS))
        probs = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(q.dtype)
        return jnp.einsum("kgts,skd->tkgd", probs, v).reshape(q.shape)

    return Case(ours, plain, ((TOKENS, 4, DIM), (TOKENS, 2, DIM), (TOKENS, 2, DIM)))


CASES = {
    "matmul": Case(
        lambda x, w, b, r: matmul_op.matmul(x, matmul_op.pack(w), n=96, bias=b, residual=r),
        lambda x, w, b, r: (_dot(x, w) + b + r).astype(x.dtype),
        ((TOKENS, 80), (80, 96), (96,), (TOKENS, 96)),
        wide=(2,),
    ),
    "gated_matmul, silu": Case(
        lambda x, g, u: matmul_op.gated_matmul(x, matmul_op.pack_gated(g, u), n=96, activation="silu"),
        lambda x, g, u: jax.nn.silu(_dot(x, g)) * _dot(x, u),
        ((TOKENS, 80), (80, 96), (80, 96)),
    ),
    "gated_matmul, gelu": Case(
        lambda x, g, u: matmul_op.gated_matmul(x, matmul_op.pack_gated(g, u), n=96, activation="gelu_tanh"),
        lambda x, g, u: jax.nn.gelu(_dot(x, g), approximate=True) * _dot(x, u),
        ((TOKENS, 80), (80, 96), (80, 96)),
    ),
    "take_columns": Case(
        lambda w: matmul_op.take_columns(matmul_op.pack(w), IDS, 80), lambda w: w[:, IDS].T, ((80, 96),)
    ),
    "rms_norm": Case(lambda x, w: rms_norm(x, w, eps=1e-5), _norm, ((TOKENS, 96), (96,)), wide=(1,)),
    "rope_cache": Case(_rope_cache, _plain_rope_cache, ((TOKENS, 8 * DIM), (DIM,), (DIM,)), wide=(1, 2)),
    "attention": _attention(None, None),
    "attention, window": _attention(100, None),
    "attention, soft cap": _attention(None, 2.0),
    "token_logprobs": Case(
        lambda x: token_logprobs(x.astype(jnp.float32), jnp.asarray(IDS), top=1)[0],
        lambda x: jax.nn.log_softmax(_wide(x))[POSITIONS, IDS],
        ((TOKENS, 96),),
    ),
}


SLOW = {"gated_matmul, gelu", "attention, window", "attention, soft cap"}
"""Variants of ops that the fast tier has."""
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


def _operands(case: Case) -> list[np.ndarray]:
    """Values that bfloat16 can hold."""
    rng = np.random.default_rng(0)
    return [np.asarray(jnp.asarray(rng.standard_normal(s), jnp.bfloat16), np.float64) for s in case.shapes]


def _loss(op, operands, weight):
    return jnp.sum(_wide(op(*operands)) * weight)


def _gradients(op, case: Case, dtype, weight) -> list[np.ndarray]:
    operands = [
        jnp.asarray(a, jnp.float32 if i in case.wide and dtype == jnp.bfloat16 else dtype)
        for i, a in enumerate(_operands(case))
    ]
    found = jax.jit(jax.grad(lambda a: _loss(op, a, weight.astype(_wide(operands[0]).dtype))))(operands)
    return [np.asarray(g, np.float64) for g in found]


def _weight(case: Case) -> np.ndarray:
    """Of every output in the sum whose gradient is taken; bfloat16 can hold it."""
    shape = jax.eval_shape(case.ours, *(jnp.zeros(s, jnp.float32) for s in case.shapes)).shape
    return np.asarray(jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.bfloat16), np.float64)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", NAMES)
def test_float32_against_finite_differences(name):
    """Along a random direction of every operand; autodiff in float64 is held to the same differences."""
    case, step = CASES[name], 1e-6
    weight, operands = _weight(case), _operands(case)
    ours = _gradients(case.ours, case, jnp.float32, weight)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        exact = _gradients(case.plain, case, jnp.float64, weight)
        loss = jax.jit(lambda a: _loss(case.plain, a, weight))
        for i, (found, expected) in enumerate(zip(ours, exact, strict=True)):
            # A direction that leans towards the gradient: across it a difference would measure rounding alone.
            direction = rng.standard_normal(found.shape)
            direction = direction / np.linalg.norm(direction) + expected / np.linalg.norm(expected)
            around = [
                float(loss([a + sign * step * direction if j == i else a for j, a in enumerate(operands)]))
                for sign in (1, -1)
            ]
            slope = (around[0] - around[1]) / (2 * step)
            assert abs(np.sum(expected * direction) - slope) <= 1e-6 * abs(slope)
            assert abs(np.sum(found * direction) - slope) <= IN_FLOAT32 * abs(slope)
            assert _error(found, expected) <= IN_FLOAT32
            assert _error(found * (1 + 2 * IN_FLOAT32), expected) > IN_FLOAT32, "it would see that much"


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_beside_plain_jax(name):
    case = CASES[name]
    weight = _weight(case)
    ours, plain = (_gradients(op, case, jnp.bfloat16, weight) for op in (case.ours, case.plain))
    with jax.enable_x64(True):
        exact = _gradients(case.plain, case, jnp.float64, weight)
    for found, theirs, expected in zip(ours, plain, exact, strict=True):
        assert _error(found, expected) <= BESIDE_PLAIN * _error(theirs, expected) + IN_FLOAT32
    assert _error(plain[0], exact[0]) > 100 * IN_FLOAT32, "float32 is exact beside it"


@pytest.mark.slow
def test_whole_model_beside_plain_jax(tmp_path):
    """Mean logprob of three sequences through two layers of Qwen3 in bfloat16, beside the same model in plain JAX."""
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "model", "qwen3"))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 259, 96).tolist() for _ in range(3)]

    def plain(dtype):
        model = Baseline(checkpoint, dtype=dtype, max_model_len=96)

        def mean(params):
            zeros = jnp.zeros(3, jnp.int32)
            logits, _ = model.forward(params, model.new_cache(3), jnp.asarray(sequences), zeros, every=True)
            found = jax.nn.log_softmax(logits[:, :-1])
            return jnp.mean(jnp.take_along_axis(found, jnp.asarray(sequences)[:, 1:, None], axis=-1))

        return _by_name(jax.jit(jax.grad(mean))(model.params))

    model = build_model(checkpoint, checkpoint.config, dtype=jnp.bfloat16, backend=None, max_model_len=96)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    ((micro, _),) = pack(sequences, 384)
    count = sum(map(len, sequences)) - 3
    mean = jax.jit(jax.grad(lambda p: jnp.sum(logprobs(nnx.merge(graph, p, rest), micro)) / count))
    ours, theirs, exact = _unpacked(mean(params), model.config), plain("bfloat16"), plain("float32")
    assert ours.keys() == theirs.keys() == exact.keys()
    errors = {name: (_error(ours[name], exact[name]), _error(theirs[name], exact[name])) for name in exact}
    assert all(0.5 * other < own < BESIDE_PLAIN * other for own, other in errors.values()), errors
    assert min(other for _, other in errors.values()) > 100 * IN_FLOAT32, "float32 is exact beside them"


def _by_name(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Baseline's gradients, matrices [in, out] and those that we keep together side by side."""
    found = {name: params[name] for name in ("embedding", "head", "norm")}
    found["embedding"] = found["embedding"].T
    for i, layer in enumerate(params["layers"]):
        joined = {
            "qkv": [f"self_attn.{n}_proj" for n in "qkv"],
            "gate": ["mlp.gate_proj"],
            "up": ["mlp.up_proj"],
        }
        joined |= {"output": ["self_attn.o_proj"], "down": ["mlp.down_proj"]}
        joined |= {n: [f"self_attn.{n}"] for n in ("q_norm", "k_norm")}
        joined |= {"input_norm": ["input_layernorm"], "post_norm": ["post_attention_layernorm"]}
        for name, parts in joined.items():
            found[f"{i} {name}"] = jnp.concatenate([layer[part] for part in parts], axis=-1)
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def _unpacked(params: nnx.State, c) -> dict[str, np.ndarray]:
    """Our gradients by the same names."""
    unpack = matmul_op.unpack
    found = {n: unpack(params[n][...], c.hidden_size, c.vocab_size) for n in ("embedding", "head")}
    found["norm"] = params["norm"]["weight"][...]
    for i, layer in params["layers"].items():
        heads, width = layer["attention"], (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
        found[f"{i} qkv"] = unpack(heads["qkv"][...], c.hidden_size, width)
        found[f"{i} output"] = unpack(heads["output"][...], c.num_q_heads * c.head_dim, c.hidden_size)
        found[f"{i} down"] = unpack(layer["mlp"]["down"][...], c.intermediate_size, c.hidden_size)
        gate_up = registry.load("matmul", None).unpack_gated(
            layer["mlp"]["gate_up"][...], c.hidden_size, c.intermediate_size
        )
        found |= {f"{i} {n}": x for n, x in zip(("gate", "up"), gate_up, strict=True)}
        found |= {f"{i} {n}_norm": heads[f"{n}_norm"][...] for n in "qk"}
        found |= {f"{i} {n}_norm": layer[f"{n}_norm"]["weight"][...] for n in ("input", "post")}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}
