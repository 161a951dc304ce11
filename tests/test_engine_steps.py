"""Several decode steps taken at once give the tokens and caches of single ones, bit for bit."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import PAGES, REQUESTS, bits, compiled, fill_cache, finish, model_of, new_engine
from engine_runs import tokens as random_tokens

from jaxdet.engine import batch as arrays
from jaxdet.engine.engine import _take_steps
from jaxdet.engine.scheduler import Part
from jaxdet.engine.step import Step
from jaxdet.models.layers import Batch
from jaxdet.sampling_params import SamplingParams

STEPS = 4
KINDS = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.3, "top_p": 0.7, "seed": 2**40},
    {"temperature": 1.0, "top_k": 7, "min_p": 0.02},
)


@pytest.fixture(scope="module")
def model():
    return model_of()


def free(index: int, **fields) -> tuple[list[int], SamplingParams]:
    """A request in which the host has no part before the end."""
    shared: dict[str, Any] = {"max_tokens": 9 + index % 5, "ignore_eos": index % 2 == 0}
    return REQUESTS[index].prompt, SamplingParams(**(shared | KINDS[index % len(KINDS)] | fields))


FREE = [free(i) for i in (0, 3, 6, 7, 9, 10)]


def engine_of(model, **changes):
    """An engine that takes several steps at once, and a tally of how many it took."""
    engine = new_engine(model, **({"num_scheduler_steps": STEPS} | changes))
    engine.keep_logits = False
    taken, schedule = collections.Counter(), engine.scheduler.schedule

    def counted(*args):
        plan = schedule(*args)
        taken[plan.steps] += bool(plan)
        return plan

    engine.scheduler.schedule = counted  # type: ignore[method-assign]
    return engine, taken


def ends(engine, requests) -> list[tuple]:
    queued = [engine.add(*request)[0] for request in requests]
    finish(engine)
    return [(s.output, s.finish_reason, s.stop_reason) for s in queued]


@pytest.fixture(scope="module")
def alone(model):
    """Each request by itself, step by step."""
    return [ends(engine_of(model, num_scheduler_steps=1)[0], [request])[0] for request in FREE]


def test_tokens(model, alone):
    """Beside each other, in both orders; sequences end in the midst of several steps."""
    for order in (1, -1):
        engine, taken = engine_of(model)
        assert ends(engine, FREE[::order]) == alone[::order]
        assert taken[STEPS] and taken[1], taken
    assert {reason for _, reason, _ in alone} == {"length"}


def test_stop_in_the_midst(model):
    """What was computed after a stop token is dropped, and its pages serve others."""
    stops = list(range(0, 256, 5))
    requests = [free(i, stop_token_ids=stops, max_tokens=40, temperature=1.0) for i in range(5)]
    expected = [ends(engine_of(model, num_scheduler_steps=1)[0], [request])[0] for request in requests]
    engine, taken = engine_of(model)
    assert ends(engine, requests) == expected and taken[STEPS]
    assert {reason for _, reason, _ in expected} >= {"stop"}
    assert len({len(output) % STEPS for output, *_ in expected}) > 1
    assert ends(engine, FREE[:4]) == ends(engine_of(model, num_scheduler_steps=1)[0], FREE[:4])


def test_few_pages(model, alone):
    """Pages run out: single steps, preemption, and the same tokens."""
    engine, taken = engine_of(model)
    kept = [engine.pool.allocate() for _ in range(PAGES - 1 - 6)]
    rng, waiting, live = np.random.default_rng(0), list(range(len(FREE))) * 2, []
    while waiting or engine.has_work:
        for _ in range(int(rng.integers(0, 3))):
            if waiting:
                index = waiting.pop(0)
                live.append((index, engine.add(*FREE[index])[0]))
        engine.step()
        if live and rng.random() < 0.05:
            engine.abort(live[int(rng.integers(len(live)))][1])
    engine.pool.release(kept)
    assert engine.pool.available == PAGES - 1 and engine.scheduler.preemptions and taken[STEPS]
    aborted = 0
    for index, sequence in live:
        output, *rest = alone[index]
        if sequence.finish_reason == "abort":
            aborted += 1
            assert sequence.output == output[: sequence.num_output]
        else:
            assert [sequence.output, sequence.finish_reason, sequence.stop_reason] == [output, *rest]
    assert aborted < len(live)


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"logit_bias": {97: 1.0}}, {"frequency_penalty": 0.5}])
def test_host_in_between(model, fields, alone):
    """One request that the host has a part in makes all go step by step."""
    engine, taken = engine_of(model)
    (needy,) = engine.add(*free(2, **fields, max_tokens=30))
    assert ends(engine, FREE[:3]) == alone[:3]
    assert needy.num_output == 30 and taken[STEPS] == 0


def test_one_token_to_score(model):
    engine, _ = engine_of(model)
    sequence = engine.add_score([5])
    (other,) = engine.add(*FREE[1])
    finish(engine)
    assert (sequence.finish_reason, sequence.output, other.finish_reason) == ("length", [], "length")


def test_error_in_the_midst(model, alone):
    """NaN in one sequence's pages ends it alone."""
    engine, taken = engine_of(model, enable_prefix_caching=False)
    (victim,) = engine.add(*free(5, max_tokens=30))
    others = [engine.add(*FREE[i])[0] for i in (3, 4)]
    while not victim.num_output:
        engine.step()
    fill_cache(engine, np.nan, np.array(victim.pages))
    finish(engine)
    assert victim.finish_reason == "error" and taken[STEPS]
    assert [s.output for s in others] == [alone[i][0] for i in (3, 4)]


@pytest.mark.parametrize("bad", range(STEPS))
def test_an_error_after_some_steps(model, bad):
    engine, _ = engine_of(model)
    (sequence,) = engine.add(*free(2, max_tokens=9))
    part = Part(sequence, 0, 1, [], True, STEPS)
    _take_steps(part, 1, [[7, 20 + i] for i in range(STEPS)], [[True, i != bad] for i in range(STEPS)])
    assert (sequence.output, sequence.finish_reason) == ([20 + i for i in range(bad)], "error")


def test_caches(model):
    """All keys and values after several steps at once equal those of single steps, beside NaN, inf and 1e30."""
    rows, compared = 4, 0
    rng = np.random.default_rng(0)
    tables = np.arange(1, 1 + rows * 3, dtype=np.int32).reshape(rows, 3)
    starts, counts = np.array([0, 100, 126, 255]), np.array([STEPS, STEPS, STEPS, 2], np.int32)
    ids, feed, slots = (np.asarray(x, np.int32) for x in (random_tokens(0, rows), [-1] * rows, range(rows)))
    sampling = _sampling(rows, starts)
    old = [
        tuple(jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in layer)
        for layer in new_engine(model)._cache
    ]

    def caches(step: Step, order, poison=None):
        """Every row's own pages after the steps, both ways; `order` says which sequence is in which row."""
        found = []
        for at_once in (True, False):
            cache = jax.tree.map(jnp.array, old)
            for row, value in (poison or {}).items():
                pages = tables[row]
                cache = [tuple(x.at[pages].set(value) for x in layer) for layer in cache]
            tokens, last = ids[order], jnp.zeros(8, jnp.int32)
            batch = _batch(tokens, starts[order], tables[order])
            rows_of = jax.tree.map(lambda x: x[order], sampling)
            if at_once:
                found_tokens, _, last, cache = step.decode(
                    cache, last, feed, batch, counts[order], rows_of, slots, steps=STEPS
                )
                chosen = np.asarray(found_tokens)
            else:
                chosen = []
                for i in range(STEPS):
                    live = np.minimum(i, counts[order] - 1)
                    batch = _batch(tokens, starts[order] + live, tables[order], i < counts[order])
                    _, logits, cache = step.run(cache, last, feed, batch)
                    here = type(rows_of)(**(vars(rows_of) | {"position": rows_of.position + live}))
                    drawn, _, last = step.draw(logits, here, slots, last)
                    chosen.append(tokens := np.asarray(drawn))
                chosen = np.stack(chosen)
            mine = [[np.asarray(x)[tables[row]] for layer in cache for x in layer] for row in range(rows)]
            found.append((chosen[:, np.argsort(order)], mine))
        return found

    step, order = compiled(model), np.arange(rows)
    (tokens, mine), (expected, theirs) = caches(step, order)
    turned, _ = caches(step, order[::-1], {2: np.nan, 3: 1e30})
    infinite, _ = caches(step, np.array([2, 0, 3, 1]), {2: np.inf, 3: np.nan})
    for row in range(rows):
        assert (tokens[: counts[row], row] == expected[: counts[row], row]).all()
        for a, b in zip(mine[row], theirs[row], strict=True):
            compared += a.size
            assert (bits(a) == bits(b)).all()
        if row < 2:
            for chosen, other in (turned, infinite):
                assert (chosen[:, row] == tokens[:, row]).all()
                assert all((bits(a) == bits(b)).all() for a, b in zip(mine[row], other[row], strict=True))
    assert compared > 50_000
    flipped = [np.asarray(x).copy() for x in mine[0]]
    flipped[0].view(np.uint32)[0, 0, 0, 0] ^= 1
    assert any((bits(a) != bits(b)).any() for a, b in zip(flipped, theirs[0], strict=True))


def _batch(ids, positions, tables, live: Any = True):
    positions = np.asarray(positions, np.int32)
    page = np.where(live, tables[np.arange(len(ids)), positions // 128], 0)
    none = np.zeros((0, tables.shape[1]), np.int32), np.zeros(1, np.int32), np.zeros(0, np.int32)
    slots = (page * 128 + positions % 128).astype(np.int32)
    return Batch(np.asarray(ids, np.int32), positions, slots, tables, positions + 1, *none)


def _sampling(rows: int, starts):
    table = np.tile([1.0, 0, 0.9, 0, 1, 2, 0], (rows, 1))
    columns = (table[:, i].astype(kind) for i, kind in enumerate(("f4", "i4", "f4", "f4")))
    seeds = table[:, 4:6].astype(np.uint32)
    rest = table[:, 6].astype(np.int32), (starts + 1).astype(np.int32)
    return arrays.SamplingRows(*columns, seeds, *rest)


def test_stats_count_steps(model):
    engine, taken = engine_of(model)
    ends(engine, FREE[:2])
    assert engine.stats().steps == sum(steps * count for steps, count in taken.items())


@pytest.mark.slow
def test_everything_is_compiled_at_start(model):
    engine, taken = engine_of(model, max_num_seqs=2, max_num_batched_tokens=32)
    engine.step_fn = Step(model)
    engine.compile_all()
    assert ends(engine, FREE[:3]) and taken[STEPS]
    assert engine.stats().compiled_after_start == 0


@pytest.mark.parametrize("top", [0, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_scores_alike_among_any_number_of_rows(dtype, top):
    """Its last rows are scored with some that were scored before; a NaN stays in its row."""
    model = model_of(dtype=jnp.dtype(dtype))
    step, rng = Step(model), np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((200, model.config.hidden_size)), dtype).at[70].set(jnp.nan)
    targets = rng.integers(0, model.config.vocab_size, 200).astype(np.int32)

    def score(rows):
        found = jax.tree.leaves(step.score(hidden[rows], targets[rows], top=top))
        assert [x.shape for x in found] == [(len(targets[rows]),)] * 2 + [(len(targets[rows]), top)] * 2
        return [np.asarray(x).view(np.int32) for x in found]

    whole = score(slice(None))
    for rows in (slice(0, 1), slice(3, 66), slice(64), slice(65), slice(60, 189), slice(72, 200)):
        for mine, of_all in zip(score(rows), whole, strict=True):
            np.testing.assert_array_equal(mine, of_all[rows])
    assert np.isnan(whole[0].view(np.float32)).nonzero()[0].tolist() == [70]
    assert (score(slice(1, 65))[0] != whole[0][:64]).any(), "the comparison sees other rows"
