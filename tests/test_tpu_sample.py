"""The TPU sampling kernels, interpreted: the xla backend's tokens, row by row, whoever else is in the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_rows import HOSTILE, bits, error

from pallas_kernels.compat import tpu_interpreter
from pallas_kernels.sample import mosaic_tpu, xla
from pallas_kernels.sample.op import SamplingRows, sample, token_logprobs

pytestmark = pytest.mark.interpret
TPU = "mosaic_tpu"
COUNT, VOCAB = 11, 3000  # two blocks of rows, three chunks of a row


def parameters(count: int = COUNT) -> SamplingRows:
    rng = np.random.default_rng(1)
    of = lambda dtype, *values: np.resize(np.asarray(values, dtype), count)  # noqa: E731
    return SamplingRows(
        temperature=of(np.float32, 0, 0.7, 1, 1.3, 2),
        top_k=of(np.int32, 0, 0, 5, 40, 1, 7, 3000),
        top_p=of(np.float32, 1, 0.9, 1, 0.5, 1e-9, 0.99, 1),
        min_p=of(np.float32, 0, 0, 0.05),
        seed=rng.integers(0, 2**32, (count, 2), np.uint32),
        sample_index=of(np.int32, 0, 1, 2),
        position=np.arange(count, dtype=np.int32),
    )


def logits(count: int = COUNT, vocab: int = VOCAB) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((count, vocab)).astype(np.float32) * 3
    x[1::2] = np.round(x[1::2])  # ties at every edge
    x[:, vocab // 2 : vocab // 2 + 9] = -np.inf
    return x


def take(rows: SamplingRows, index) -> SamplingRows:
    return jax.tree.map(lambda x: x[index], rows)


@pytest.fixture
def sampler():
    with tpu_interpreter():
        yield jax.jit(lambda x, rows: sample(x, rows, backend=TPU))


def test_tokens_are_the_xla_backends(sampler):
    x, rows = logits(), parameters()
    tokens, usable = sampler(x, rows)
    expected = jax.jit(xla.sample)(x, rows)
    np.testing.assert_array_equal(tokens, expected[0])
    assert usable.all()
    other = dataclasses.replace(rows, position=rows.position + 1)
    drawn = rows.temperature > 0
    assert (np.asarray(sampler(x, other)[0]) != tokens)[drawn].any(), "another noise gives other tokens"


def test_every_kind_of_row_on_many_draws(sampler):
    """One row of logits, drawn again and again: the same tokens as xla's, and not one token alone."""
    rows, x = parameters(88), np.repeat(logits(1, 300) / 4, 88, axis=0)
    tokens = np.asarray(sampler(x, rows)[0])
    np.testing.assert_array_equal(tokens, jax.jit(xla.sample)(x, rows)[0])
    assert len(set(tokens.tolist())) > 20


def test_rows_never_matter(sampler):
    x, rows = logits(), parameters()
    tokens = np.asarray(sampler(x, rows)[0])
    for index in ([3], [9, 1], [10, 4, 0, 7, 7, 2, 5, 8, 6]):
        np.testing.assert_array_equal(sampler(x[index], take(rows, np.array(index)))[0], tokens[index])
    hostile = x.copy()
    hostile[::2] = np.resize(HOSTILE, (6, 1))
    found, usable = (np.asarray(y) for y in sampler(hostile, rows))
    np.testing.assert_array_equal(found[1::2], tokens[1::2])
    assert usable.tolist() == [False, True] * 3 + [True] * 2 + [False, True, False]
    assert (found[::2] != tokens[::2]).any(), "the comparison sees the hostile rows"


def test_greedy_alone_is_a_row_of_temperature_zero(sampler):
    x = logits()
    x[3, 77] = x[3, 2500] = 40.0  # a tie goes to the lowest id
    x[4, 5] = np.nan
    greedy, usable = sampler(x, None)
    np.testing.assert_array_equal(np.asarray(greedy)[usable], np.argmax(x, axis=1)[np.asarray(usable)])
    assert usable.tolist() == [i != 4 for i in range(COUNT)]
    zero = dataclasses.replace(parameters(), temperature=np.zeros(COUNT, np.float32))
    np.testing.assert_array_equal(sampler(x, zero)[0], greedy)


def test_logprobs():
    x = logits()
    ids = np.resize(np.array([0, 7, VOCAB - 1, 1499, 12], np.int32), COUNT)
    with tpu_interpreter():
        f = jax.jit(lambda x, ids: token_logprobs(x, ids, top=4, backend=TPU))
        found = [np.asarray(y) for y in f(x, ids)]
        few = [np.asarray(y) for y in f(np.stack([x[8], np.full(VOCAB, np.nan, np.float32)]), ids[[8, 0]])]
    expected = jax.jit(xla.token_logprobs, static_argnames="top")(x, ids, top=4)
    for ours, theirs in zip((found[1], found[3]), (expected[1], expected[3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, alone in zip(found, few, strict=True):
        np.testing.assert_array_equal(bits(alone[0]), bits(ours[8]))
    assert np.isnan(few[0][1]), "the comparison sees a hostile row"
    wide = x.astype(np.float64)
    peak = wide.max(axis=1)
    exact = wide[np.arange(COUNT), ids] - peak - np.log(np.exp(wide - peak[:, None]).sum(axis=1))
    assert error("token_logprobs", found[0], exact) < 1e-6


@pytest.mark.parametrize("vocab", [1, 1024, 3000])
def test_the_sum_is_the_tree_that_its_page_names(vocab):
    x = np.random.default_rng(2).standard_normal((3, vocab)).astype(np.float32)
    total = np.pad(x, ((0, 0), (0, -vocab % 1024))).reshape(3, -1, 1024)
    lanes = total[:, 0]
    for chunk in range(1, total.shape[1]):
        lanes = lanes + total[:, chunk]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]

    def body(x_ref, out_ref, *, vocab):
        value = mosaic_tpu._within(x_ref, vocab)
        width = x_ref.shape[1]
        total = mosaic_tpu._sum(width, lambda at, ids: jnp.where(ids < vocab, value(at, ids), 0.0))
        mosaic_tpu._write(out_ref, mosaic_tpu._bits(total))

    with tpu_interpreter():
        np.testing.assert_array_equal(mosaic_tpu._launch(body, x)[0], lanes[:, 0].view(np.int32))


def test_too_many_tokens_name_the_backend_that_takes_them():
    with pytest.raises(ValueError, match="use backend='xla'"):
        sample(jnp.zeros((1, 2**18 + 1)), None, backend=TPU)
