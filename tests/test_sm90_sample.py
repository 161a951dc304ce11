"""Hopper sampling without a GPU: interpreted against the xla backend and itself, lowered for CUDA."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet.verify.hlo import lint
from pallas_kernels.compat import gpu_interpreter
from pallas_kernels.sample import backward_sm90 as backward
from pallas_kernels.sample import mosaic_gpu_sm90 as kernel
from pallas_kernels.sample import rounds_sm90 as rounds
from pallas_kernels.sample import top_k_sm90 as top_k
from pallas_kernels.sample import xla
from pallas_kernels.sample.chunks_sm90 import CHUNK
from pallas_kernels.sample.logprobs_sm90 import log_sum_exp
from pallas_kernels.sample.op import SamplingRows, token_logprobs

ROWS, VOCAB = 4, 8300  # two chunks


def _rows(count: int) -> SamplingRows:
    rng = np.random.default_rng(1)
    of = lambda dtype, *values: jnp.asarray(np.resize(values, count), dtype)  # noqa: E731
    return SamplingRows(
        temperature=of(jnp.float32, 0, 0.7, 1, 1.3),
        top_k=of(jnp.int32, 0, 0, 5, 40),
        top_p=of(jnp.float32, 1, 0.9, 1, 0.5),
        min_p=of(jnp.float32, 0, 0, 0, 0.05),
        seed=jnp.asarray(rng.integers(0, 2**32, (count, 2)), jnp.uint32),
        sample_index=of(jnp.int32, 0, 1, 2),
        position=jnp.arange(count, dtype=jnp.int32),
    )


def _logits() -> jax.Array:
    logits = jax.random.normal(jax.random.key(0), (ROWS, VOCAB)) * 3
    return logits.at[2:4].set(jnp.round(logits[2:4]))  # ties at every edge


def _take(rows: SamplingRows, index) -> SamplingRows:
    return jax.tree.map(lambda x: x[index], rows)


@pytest.mark.slow
@pytest.mark.interpret
def test_tokens_are_the_xla_backends_and_rows_are_independent():
    logits, rows = _logits(), _rows(ROWS)
    with gpu_interpreter():
        tokens, usable = jax.jit(kernel.sample)(logits, rows)
        index = jnp.array([3, 0])
        hostile = logits[index].at[1].set(jnp.nan)
        few, few_usable = jax.jit(kernel.sample)(hostile, _take(rows, index))
    np.testing.assert_array_equal(tokens, jax.jit(xla.sample)(logits, rows)[0])
    assert usable.all() and few_usable.tolist() == [True, False]
    np.testing.assert_array_equal(few[0], tokens[3])
    other = dataclasses.replace(rows, position=rows.position + 1)
    assert (jax.jit(xla.sample)(logits, other)[0] != tokens)[1:].any(), "another noise gives other tokens"


def _rejecting() -> tuple[jax.Array, SamplingRows]:
    """Rows that top-p leaves so little of that most candidates are rejected: flat, steep, with ties, all equal."""
    logits = jax.random.normal(jax.random.key(3), (8, VOCAB))
    logits = logits * jnp.array([0.3, 0.3, 3, 3, 1, 1, 0, 0])[:, None]
    logits = logits.at[4:6].set(jnp.round(logits[4:6]))
    top_p = jnp.array([0.01, 0.001, 0.1, 1e-30, 0.02, 0.3, 0.01, 1e-9])
    plain = dataclasses.replace(_rows(8), temperature=jnp.ones(8), min_p=jnp.zeros(8))
    return logits, dataclasses.replace(plain, top_p=top_p, top_k=jnp.zeros(8, jnp.int32))


def _rounds_of(logits, rows) -> list[tuple[int, int]]:
    """(token, rounds) of every row, by rejection in float64."""
    noise = np.asarray(xla.gumbel(rows.seed, rows.sample_index, rows.position, VOCAB))
    found = []
    for x, noisy, p in zip(
        np.asarray(logits), np.asarray(logits) + noise, np.asarray(rows.top_p), strict=True
    ):
        order = np.lexsort((np.arange(VOCAB), -x))
        mass = np.exp(x[order].astype(np.float64) - x.max())
        end, number = VOCAB, 0
        while not number or (end and mass[:end].sum() >= p * mass.sum()):
            end, number = int(np.argmax(noisy[order[:end]])), number + 1
        found.append((int(order[end]), number))
    return found


@pytest.mark.interpret
def test_a_token_does_not_depend_on_how_many_rounds_are_launches(monkeypatch):
    logits, rows = _rejecting()
    want, needed = map(list, zip(*_rounds_of(logits, rows), strict=True))
    assert max(needed) > 4 and needed.count(1) < 4, "rows go on in the last launch, wherever it begins"
    with gpu_interpreter():
        assert jax.jit(kernel.sample)(logits, rows)[0].tolist() == want
        monkeypatch.setattr(rounds, "REDRAWS", 0)  # traced anew for another number of rows
        hostile, index = _in_company(logits[:ROWS])[:ROWS], jnp.arange(8)[::-1]
        beside = jnp.concatenate([hostile, logits[index]])
        company = _take(rows, jnp.concatenate([jnp.array([1, 2, 1, 0]), index]))
        tokens, usable = jax.jit(kernel.sample)(beside, company)
    assert tokens[:3:-1].tolist() == want and usable.tolist() == [False] * 3 + [True] * 9
    assert jax.jit(xla.sample)(logits, rows)[0].tolist() == want
    unlimited = dataclasses.replace(rows, top_p=jnp.ones(8))
    first = jax.jit(xla.sample)(logits, unlimited)[0].tolist()
    assert [a == b for a, b in zip(first, want, strict=True)] == [n == 1 for n in needed], "rejection matters"


@pytest.mark.interpret
def test_top_k_keeps_the_first_of_those_tied_at_its_edge():
    logits = jnp.round(jax.random.normal(jax.random.key(5), (6, VOCAB)))
    logits = logits.at[2].set(0).at[3, 7:].set(-jnp.inf)
    wanted = jnp.array([1, 3000, CHUNK + 20, 20, 0, -1])
    with gpu_interpreter():
        found = jax.jit(top_k.edge)(logits, jnp.ones(6), jnp.full(6, -100.0), wanted)
    edge, cut = (x[:, None] for x in found)
    kept = (logits > edge) | ((logits == edge) & (logits > -jnp.inf) & (jnp.arange(VOCAB) <= cut))
    for x, k, row in zip(np.asarray(logits), wanted.tolist(), kept, strict=True):
        order = np.lexsort((np.arange(VOCAB), -x))[: k if k > 0 else VOCAB]
        assert sorted(order[x[order] > -np.inf]) == np.flatnonzero(row).tolist()


@pytest.mark.parametrize("x64", [False, True])
def test_sampling_lowers_for_cuda(x64):
    """`jax_enable_x64` is the user's."""
    logits, rows = jax.ShapeDtypeStruct((3, 151936), jnp.float32), _rows(3)
    with jax.enable_x64(x64):
        jax.jit(lambda *a: kernel.sample(*a)).trace(logits, rows).lower(lowering_platforms=("cuda",))


IDS = jnp.array([0, VOCAB - 1, CHUNK, 4000], jnp.int32)


def _bits(x):
    return np.asarray(x).view(np.uint32)


def _in_company(logits):
    """The rows after others: with a NaN, with +inf, all −inf, with 1e30."""
    hostile = logits.at[:2, 5].set(jnp.array([jnp.nan, jnp.inf])).at[2].set(-jnp.inf).at[3, 5].set(1e30)
    return jnp.concatenate([hostile, logits])


@pytest.mark.interpret
def test_a_rows_normaliser_is_its_own():
    logits = _logits()
    call = jax.jit(log_sum_exp)
    with gpu_interpreter():
        alone = [call(logits[i : i + 1]) for i in range(ROWS)]
        beside = call(_in_company(logits))
        swapped = call(jnp.roll(logits, 1000, axis=1))
        banned = jnp.concatenate([logits[:, :CHUNK], jnp.full((ROWS, VOCAB - CHUNK), -jnp.inf)], axis=1)
        shorter, banned = call(logits[:, :CHUNK]), call(banned)
    alone = [jnp.concatenate(values) for values in zip(*alone, strict=True)]
    for got, want in zip(beside, alone, strict=True):
        np.testing.assert_array_equal(_bits(got[-ROWS:]), _bits(want))
    np.testing.assert_array_equal(np.isfinite(beside[1])[:, 0], [False] * 3 + [True] * (1 + ROWS))
    assert (_bits(swapped[1]) != _bits(alone[1])).any(), "the comparison would see another order"
    np.testing.assert_array_equal(_bits(banned[1]), _bits(shorter[1]))
    wide = np.asarray(logits, np.float64)
    exact = np.log(np.exp(wide).sum(axis=1))
    np.testing.assert_allclose((alone[0] + alone[1])[:, 0], exact, rtol=3e-7)


@pytest.mark.slow
@pytest.mark.interpret
def test_logprobs_and_ranks_are_the_xla_backends():
    logits = _logits()
    with gpu_interpreter():
        ours = jax.jit(functools.partial(token_logprobs, top=3, backend="mosaic_gpu"))(logits, IDS)
    theirs = jax.jit(functools.partial(token_logprobs, top=3))(logits, IDS)
    for got, want in zip(ours[::2], theirs[::2], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)
    for got, want in zip(ours[1::2], theirs[1::2], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.interpret
def test_a_logprobs_gradient_is_its_rows_own_and_close_to_float64():
    logits, d = _logits()[:, :-2], jnp.array([1.0, -0.3, 0.0, 1e-3])  # a length that is filled up
    ids = jnp.minimum(IDS, logits.shape[1] - 1)

    @jax.jit
    def gradient(logits, ids, d):
        values, saved = backward.forward(kernel, logits, ids, top=1)
        return values[0], backward.token_logprobs(logits, ids, saved, d)

    with gpu_interpreter():
        values, found = gradient(logits, ids, d)
        plain = jax.jit(functools.partial(kernel.token_logprobs, top=1))(logits, ids)[0]
        beside = gradient(_in_company(logits), jnp.tile(ids, 2), jnp.tile(d, 2))[1]
    np.testing.assert_array_equal(_bits(values), _bits(plain))
    np.testing.assert_array_equal(_bits(beside[-ROWS:]), _bits(found))
    dead = beside[jnp.tile(d, 2) == 0]
    assert (_bits(dead) == 0).all(), "rows without a gradient are zero, whatever their logits"
    assert np.isnan(beside[:2]).all(), "the comparison sees the hostile rows"
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits, np.float64))
        loss = lambda x: jnp.sum(jax.nn.log_softmax(x)[jnp.arange(ROWS), np.asarray(ids)] * np.asarray(d))  # noqa: E731
        exact = np.asarray(jax.grad(loss)(wide))
    np.testing.assert_allclose(found, exact, rtol=3e-6, atol=1e-12)


def _trained(logits, ids, d, *, backend):
    """(logprobs, their gradient), as a trainer asks for them."""
    value, pull = jax.vjp(lambda x: token_logprobs(x, ids, top=1, backend=backend)[0], logits)
    return value, pull(d)


def test_logprobs_lower_for_cuda_and_are_pinned():
    logits, ids, d = (
        jax.ShapeDtypeStruct((3, *s), t) for s, t in (((151936,), "f4"), ((), "i4"), ((), "f4"))
    )
    score = functools.partial(token_logprobs, top=20, backend="mosaic_gpu")
    train = functools.partial(_trained, backend="mosaic_gpu")
    for f, operands, kernels in ((score, (logits, ids), 1), (train, (logits, ids, d), 2)):
        lowered = jax.jit(f).trace(*operands).lower(lowering_platforms=("cuda",))
        report = lint({"logprobs": lowered.as_text("hlo", debug_info=True)}, "mosaic_gpu")
        assert report.ok, report.findings
        (program,) = report.programs.values()
        assert sum(op.target.startswith("mosaic_gpu") for op in program.ops) == kernels


def test_a_trainer_pays_for_no_rank_and_no_top():
    """Both are results of the op; XLA leaves out what nobody asks for."""
    logits, ids, d = jnp.zeros((3, 2000)), jnp.zeros(3, jnp.int32), jnp.ones(3)
    train, score = functools.partial(_trained, backend="xla"), functools.partial(token_logprobs, top=1)
    program = str(jax.jit(train).lower(logits, ids, d).compile().as_text())
    whole = str(jax.jit(score).lower(logits, ids).compile().as_text())
    for op in ("topk", "compare.*direction=GT"):
        assert not re.search(op, program, re.IGNORECASE), op
        assert re.search(op, whole, re.IGNORECASE), op
