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
from pallas_kernels.sample.chunks_sm90 import CHUNK, PIECE, aligned
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


@jax.jit
def _edges(logits, scale, floor, wanted):
    logits = aligned(logits)
    return top_k.edge(logits, kernel.peaks(logits)[2], scale, floor, wanted)


def _edge_by_sorting(x, floor, wanted) -> tuple[float, int]:
    values = np.sort(x[x >= floor])[::-1]
    if not 0 < wanted <= len(values):
        return -np.inf, xla.INT32_MAX if wanted > 0 else -1
    edge = values[wanted - 1]
    left, tied = wanted - (x > edge).sum(), np.flatnonzero(x == edge)
    return edge, xla.INT32_MAX if left >= len(tied) else tied[left - 1]


def _hostile_rows(vocab: int) -> list[np.ndarray]:
    """The last two are unusable."""
    rng = np.random.default_rng(7)
    plain = rng.normal(size=vocab) * 3
    few, tied, one, nan, inf = np.full(vocab, -np.inf), *(plain.copy() for _ in range(4))
    few[rng.choice(vocab, 5, replace=False)] = 1, 2, 2, 3, -4
    tied[[0, PIECE - 1, PIECE, 2 * PIECE, vocab - PIECE - 1, vocab - PIECE, vocab - 1]] = 20
    one[PIECE + 9 : 2 * PIECE - 9] += 50  # more of them than are usually wanted, in one group
    nan[7], inf[7] = np.nan, np.inf
    several = [
        *(plain, np.round(plain), np.full(vocab, 1.5), few, tied, one, np.sort(plain), np.sort(plain)[::-1]),
        *(np.where(rng.random(vocab) < 0.5, each, plain) for each in (-np.inf, 9.0)),
        *(rng.choice([0.0, -0.0], vocab), np.full(vocab, -np.inf), plain * 1e37, nan, inf),
    ]
    return [x.astype(np.float32) for x in several]


@pytest.mark.interpret
@pytest.mark.parametrize(("vocab", "count"), [(VOCAB, 45), pytest.param(151936, 15, marks=pytest.mark.slow)])
def test_the_edge_of_top_k_is_that_of_sorting(vocab, count):
    kinds, groups = _hostile_rows(vocab), -(-vocab // PIECE)
    several = groups + 1, 20, 1000, vocab, 2, vocab + 1, 1, groups, 0, 30, 10**9, 300, -1
    wanted = np.resize(several, count).astype(np.int32)
    logits = np.stack([kinds[i % len(kinds)] for i in range(count)])
    scale = np.resize(np.float32([1, 1 / 0.7]), count)
    x = logits * scale[:, None]
    floor = np.full(count, np.finfo(np.float32).min)
    floor[3::4] = np.maximum(floor, x.max(axis=1) - 2)[3::4]
    few = np.arange(count)[::-7]
    with gpu_interpreter():
        found = jax.tree.map(np.asarray, _edges(logits, scale, floor, wanted))
        again = _edges(*(x[few] for x in (logits, scale, floor, wanted)))
    usable = [i for i in range(count) if i % len(kinds) < len(kinds) - 2]
    for i in usable:
        assert (found[0][i], found[1][i]) == _edge_by_sorting(x[i], floor[i], wanted[i]), (i, wanted[i])
    for got, want in zip(again, found, strict=True):
        np.testing.assert_array_equal(got, want[few])
    assert np.isfinite(found[0][usable]).sum() > len(usable) / 3, "not only rows without an edge"
    assert (found[1][usable] < xla.INT32_MAX).sum() > len(usable) / 4, "ties are cut"


@pytest.mark.interpret
def test_tokens_of_top_k_are_their_rows_own():
    logits, rows = _logits(), _rows(ROWS)
    rows = dataclasses.replace(rows, temperature=jnp.ones(ROWS), top_p=jnp.ones(ROWS), min_p=jnp.zeros(ROWS))
    rows = dataclasses.replace(rows, top_k=jnp.array([20, 1000, 3, 200]))
    index = jnp.arange(ROWS)[::-1]
    beside = _take(rows, jnp.concatenate([jnp.arange(ROWS), index]))
    with gpu_interpreter():
        tokens = jax.jit(kernel.sample)(logits, rows)[0]
        others, usable = jax.jit(kernel.sample)(_in_company(logits[index]), beside)
    np.testing.assert_array_equal(others[ROWS:], tokens[index])
    assert usable.tolist() == [False] * 3 + [True] * (1 + ROWS)
    np.testing.assert_array_equal(jax.jit(xla.sample)(logits, rows)[0], tokens)
    looser = dataclasses.replace(rows, top_k=jnp.zeros(ROWS, jnp.int32))
    assert (jax.jit(xla.sample)(logits, looser)[0] != tokens).any(), "the edge matters"


@pytest.mark.parametrize("x64", [False, True])
def test_sampling_lowers_for_cuda(x64):
    """`jax_enable_x64` is the user's."""
    logits, rows = jax.ShapeDtypeStruct((3, 151936), jnp.float32), _rows(3)
    with jax.enable_x64(x64):
        lowered = (
            jax.jit(lambda *a: kernel.sample(*a)).trace(logits, rows).lower(lowering_platforms=("cuda",))
        )
    program = lowered.as_text()
    assert "stablehlo.while" not in program, "a loop of launches copies its state"
    launches = 2 + 2 * (1 + rounds.REDRAWS) + 1  # peak and edge; rounds; finish
    assert len(re.findall(r"custom_call @mosaic_gpu\w*", program)) == launches


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
