"""Sampling and logprobs of the xla backend against a plain float64 sampler, and row by row independence."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels.sample import xla
from pallas_kernels.sample.op import Adjustments, SamplingRows, adjust, sample, token_logprobs

VOCABS = (288, 49152, 151936)


@jax.jit
def draw(logits, rows, adjustments=None):
    return sample(logits if adjustments is None else adjust(logits, adjustments), rows)


def bits(x):
    x = np.asarray(x)
    return x if x.dtype == bool else x.view(f"u{x.dtype.itemsize}")


def make_rows(count, vocab, seed=0):
    """Rows of every kind: greedy, plain, each filter alone, all together."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: rng.choice(np.asarray(values), count)  # noqa: E731
    return SamplingRows(
        temperature=pick(0, 0.3, 1, 1.7).astype(np.float32),
        top_k=pick(0, 0, 1, 5, 100).astype(np.int32),
        top_p=pick(1, 1, 0.2, 0.9, 0.99).astype(np.float32),
        min_p=pick(0, 0, 0.05, 0.3).astype(np.float32),
        seed=rng.integers(0, 2**32, (count, 2), np.uint32),
        sample_index=rng.integers(0, 8, count).astype(np.int32),
        position=rng.integers(0, 10000, count).astype(np.int32),
    )


def make_adjustments(count, vocab, seed=0):
    """Per row a list of (id, bias, seen, count, repetition, presence, frequency)."""
    rng = np.random.default_rng(seed)
    table = []
    for _ in range(count):
        penalties = rng.choice([1, 1.3, 0.8]), rng.choice([0, 0.7, -0.5]), rng.choice([0, 0.2, -0.1])
        entries = []
        for token in rng.permutation(vocab)[: rng.integers(0, 8)]:
            seen = bool(rng.random() < 0.6)
            bias = rng.choice([0, 0, 1.5, -2, -np.inf])
            entries.append((token, bias, seen, int(rng.integers(0, 4)) * seen, *penalties))
        table.append(entries)
    return table


def flat(table, picked=None, pad=0):
    """The picked rows' entries as the op takes them, in any order, with padding."""
    rows = range(len(table)) if picked is None else picked
    entries = [(row, *entry) for row, index in enumerate(rows) for entry in table[index]]
    entries = [*entries[::-1], *[(len(rows), 0, 0, False, 0, 1, 0, 0)] * pad]
    columns = zip(*entries, strict=True) if entries else [()] * 8
    kinds = ("i4", "i4", "f4", "?", "i4", "f4", "f4", "f4")
    return Adjustments(*(np.asarray(c, k) for c, k in zip(columns, kinds, strict=True)))


def take(rows, picked):
    return jax.tree.map(lambda x: np.asarray(x)[picked], rows)


def random_logits(count, vocab, seed=0):
    return (3 * np.random.default_rng(seed).standard_normal((count, vocab))).astype(np.float32)


def reference(logits, row, adjustments):
    """The allowed tokens' scaled logits (−inf elsewhere), float64, one row, as the contract says in words."""
    x = logits.astype(np.float64).copy()
    for token, bias, seen, count, repetition, presence, frequency in adjustments:
        x[token] += bias
        if seen:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= frequency * count + (presence if count else 0)
    if row.temperature == 0:
        return x
    x /= row.temperature
    order = np.lexsort((np.arange(len(x)), -x))
    kept = order[x[order] >= x.max() + (np.log(row.min_p) if row.min_p else -np.inf)]
    kept = kept[: row.top_k or None]
    mass = np.exp(x[kept] - x.max())
    before = np.cumsum(mass) - mass
    if row.top_p < 1:
        kept = kept[before < row.top_p * mass.sum()]
    out = np.full(len(x), -np.inf)
    out[kept] = x[kept]
    return out


@pytest.mark.parametrize(("vocab", "count"), [(288, 64), (49152, 16), (151936, 6)])
def test_agrees_with_a_plain_sampler(vocab, count):
    rows, logits, table = make_rows(count, vocab), random_logits(count, vocab), make_adjustments(count, vocab)
    tokens, usable = draw(logits, rows, flat(table))
    assert np.asarray(usable).all()
    noise = np.asarray(xla.gumbel(rows.seed, rows.sample_index, rows.position, vocab), np.float64)
    for i in range(count):
        row = take(rows, i)
        scores = reference(logits[i], row, table[i])
        assert tokens[i] == np.argmax(scores + (noise[i] if row.temperature else 0)), row


@pytest.mark.parametrize("vocab", [288, 49152])
def test_rows_never_see_their_batch(vocab):
    """Batches of 1…64 rows in any order, NaN rows and rows of any parameters beside them."""
    rows, logits, table = make_rows(12, vocab), random_logits(12, vocab), make_adjustments(12, vocab)
    alone = [int(draw(logits[i : i + 1], take(rows, [i]), flat(table, [i]))[0][0]) for i in range(12)]
    score = jax.jit(functools.partial(token_logprobs, top=5))
    ids = np.asarray(alone, np.int32)
    scored = [score(logits[i : i + 1], ids[i : i + 1]) for i in range(12)]
    rng = np.random.default_rng(1)
    for count in (2, 3, 8, 33, 64) if vocab == 288 else (2, 9):
        picked, poisoned = rng.integers(0, 12, count), rng.random(count) < 0.3
        batch = logits[picked]
        batch[poisoned] = rng.choice([np.nan, np.inf, 1e30, -np.inf], (poisoned.sum(), 1))
        tokens, usable = draw(batch, take(rows, picked), flat(table, picked, pad=int(rng.integers(0, 9))))
        found = score(batch, ids[picked])
        for i in np.flatnonzero(~poisoned):
            assert tokens[i] == alone[picked[i]] and usable[i]
            for a, b in zip(found, scored[picked[i]], strict=True):
                np.testing.assert_array_equal(bits(a[i]), bits(b[0]))


def test_padding_of_the_adjustments_never_matters():
    """A batch-mate with many penalised tokens lengthens the list."""
    rows, logits, table = make_rows(64, 288), random_logits(64, 288), make_adjustments(64, 288)
    few, many = (draw(logits, rows, flat(table, pad=pad))[0] for pad in (0, 100))
    np.testing.assert_array_equal(few, many)
    assert (np.asarray(few) != np.asarray(draw(logits, rows)[0])).any(), "adjustments matter"


def test_greedy_alone_is_temperature_zero():
    """A batch of greedy rows runs another program, to the same tokens."""
    rows, logits = make_rows(16, 49152), random_logits(16, 49152)
    mixed = draw(logits, rows)[0]
    greedy = draw(logits, None)[0]
    np.testing.assert_array_equal(np.where(rows.temperature == 0, mixed, greedy), greedy)


@pytest.mark.parametrize("vocab", [512, 8300])
def test_a_nan_makes_a_row_unusable_wherever_it_is(vocab):
    """Compiled or not: XLA's own maximum loses some on CPUs."""
    clean = random_logits(9, vocab)
    hostile = clean.copy()
    hostile[np.arange(8), np.linspace(0, vocab - 1, 8).astype(int)] = np.nan
    for run in (jax.jit(lambda x: sample(x, None)), lambda x: sample(x, None)):
        assert np.asarray(run(clean)[1]).all()
        assert np.asarray(run(hostile)[1]).tolist() == [False] * 8 + [True]


def test_unusable_rows_are_said_so():
    logits = random_logits(5, 288)
    logits[1, 7], logits[2], logits[3, 0] = np.nan, -np.inf, np.inf
    logits[4, 100:] = -np.inf
    assert np.asarray(draw(logits, make_rows(5, 288))[1]).tolist() == [True, False, False, False, True]


def plain_rows(count, **changes):
    """Temperature 1 and nothing else."""
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    rows = SamplingRows(
        temperature=ones,
        top_k=np.zeros(count, np.int32),
        top_p=ones,
        min_p=zeros,
        seed=np.zeros((count, 2), np.uint32),
        sample_index=np.zeros(count, np.int32),
        position=np.arange(count, dtype=np.int32),
    )
    return dataclasses.replace(rows, **changes)


@pytest.mark.parametrize("vocab", VOCABS)
def test_ties_go_to_the_lowest_id(vocab):
    """Equal logits: greedy takes id 0; top-k and top-p keep the first ids; −0 equals +0."""
    count = 64
    logits = np.zeros((count, vocab), np.float32)
    logits[:, 1::2] = -0.0
    greedy = draw(logits[:2], plain_rows(2, temperature=np.zeros(2, np.float32)))[0]
    assert (np.asarray(greedy) == 0).all()
    tokens = np.asarray(draw(logits, plain_rows(count, top_k=np.full(count, 3, np.int32)))[0])
    assert set(tokens) == {0, 1, 2}
    share = np.full(count, 4.5 / vocab, np.float32)
    assert set(np.asarray(draw(logits, plain_rows(count, top_p=share))[0])) == {0, 1, 2, 3, 4}
    logits[:, 0] = -0.0
    ids = np.arange(count, dtype=np.int32)
    _, rank, _, top_ids = jax.jit(functools.partial(token_logprobs, top=4))(logits, ids)
    np.testing.assert_array_equal(rank, ids + 1)
    np.testing.assert_array_equal(top_ids, np.tile(ids[:4], (count, 1)))


@pytest.mark.parametrize("vocab", [288, 49152])
def test_padding_and_bans_are_never_drawn(vocab):
    """−inf columns (padded vocabulary, banned tokens) have no part in anything."""
    count = 64
    logits = np.zeros((count, vocab), np.float32)
    logits[:, 5:] = -np.inf
    banned = flat([[(2, -np.inf, True, 1, 1.2, 0, 0)]] * count)
    tokens = set()
    for top_p in (1, 0.999):
        rows = plain_rows(count, top_p=np.full(count, top_p, np.float32))
        tokens |= set(np.asarray(draw(logits, rows, banned)[0]).tolist())
    assert tokens == {0, 1, 3, 4}


def test_seed_sample_index_and_position_each_change_the_noise():
    base = plain_rows(1, seed=np.asarray([[1, 2]], np.uint32))
    of = lambda r: np.asarray(xla.gumbel(r.seed, r.sample_index, r.position, 288))  # noqa: E731
    changes = [
        {"seed": np.asarray([[2, 2]], np.uint32)},
        {"seed": np.asarray([[1, 3]], np.uint32)},
        {"sample_index": np.asarray([1], np.int32)},
        {"position": np.asarray([1], np.int32)},
    ]
    noises = [of(base), *(of(dataclasses.replace(base, **c)) for c in changes)]
    assert len({n.tobytes() for n in noises}) == 5
    np.testing.assert_array_equal(bits(of(base)), bits(noises[0]))
    # A larger vocabulary leaves the first tokens' noise as it is.
    wide = xla.gumbel(base.seed, base.sample_index, base.position, 1000)
    np.testing.assert_array_equal(bits(wide)[:, :288], bits(noises[0]))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_threefry_known_answers(key, counter, expected):
    """Random123's own test vectors."""
    found = xla.threefry2x32(*(tuple(jnp.uint32(x) for x in pair) for pair in (key, counter)))
    assert tuple(map(int, found)) == expected


def test_uniform_stays_inside_its_interval(monkeypatch):
    """The smallest and the largest 32 bits give finite noise."""
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(
            xla, "threefry2x32", lambda key, counter, w=word: (jnp.uint32(w) + 0 * counter[0],) * 2
        )
        noise = xla.gumbel(np.zeros((1, 2), np.uint32), np.zeros(1, np.int32), np.zeros(1, np.int32), 4)
        assert np.isfinite(noise).all()


def test_draws_follow_the_distribution():
    """Chi-square of 16,384 draws from eight tokens, and its negative control."""
    probs = np.asarray([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])
    count = 16384
    logits = np.tile(np.log(probs).astype(np.float32), (count, 1))
    tokens = np.asarray(draw(logits, plain_rows(count))[0])
    found = np.bincount(tokens, minlength=8)
    assert stats.chisquare(found, probs * count).pvalue > 0.001
    assert stats.chisquare(found, np.roll(probs, 1) * count).pvalue < 1e-9


@pytest.mark.parametrize("vocab", VOCABS)
def test_logprobs(vocab):
    """Close to float64, ranked with ties by id, one definition whatever `top` is, −inf columns are no-ops."""
    logits = random_logits(4, vocab)
    logits[:, 10] = logits[:, 20] = logits[:, 15]
    ids = np.asarray([10, 15, 20, 0], np.int32)
    own, rank, top, top_ids = map(np.asarray, jax.jit(functools.partial(token_logprobs, top=20))(logits, ids))
    wide = logits.astype(np.float64)
    exact = wide - wide.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    order = np.argsort(-logits, axis=1, kind="stable")
    rows = np.arange(4)
    np.testing.assert_allclose(own, exact[rows, ids], atol=4e-6)
    np.testing.assert_array_equal(rank, 1 + np.argmax(order == ids[:, None], axis=1))
    np.testing.assert_array_equal(top_ids, order[:, :20])
    np.testing.assert_allclose(top, np.take_along_axis(exact, order[:, :20], 1), atol=4e-6)
    fewer = jax.jit(functools.partial(token_logprobs, top=0))(logits, ids)
    np.testing.assert_array_equal(bits(fewer[0]), bits(own))
    padded = np.pad(logits, ((0, 0), (0, 64)), constant_values=-np.inf)
    again = jax.jit(functools.partial(token_logprobs, top=20))(padded, ids)
    for a, b in zip(again, (own, rank, top, top_ids), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def test_plain_log_softmax_depends_on_the_batch():
    """Negative control: XLA's log-softmax of a row changes with the number of rows."""
    logits = random_logits(64, 288)
    plain = jax.jit(functools.partial(jax.nn.log_softmax, axis=1))
    whole = np.asarray(plain(logits))
    differ = sum((np.asarray(plain(logits[:m]))[0] != whole[0]).sum() for m in (1, 2, 8, 16))
    assert differ > 0
