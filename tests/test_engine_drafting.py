"""Guesses, right or wrong, from anybody: tokens, log-probabilities and logits are those of a run without guesses."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import (
    MAX_LEN,
    REQUESTS,
    Answer,
    Request,
    answer,
    differing,
    fill_cache,
    finish,
    model_of,
    new_engine,
    params,
    run,
    tokens,
)

from jaxdet.engine import batch as arrays
from jaxdet.engine.engine import Engine
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import VOCAB_SIZE
from pallas_kernels.numerics import PAGE_SIZE

GUESSES = 3
LIMITS = {"max_num_seqs": 4, "num_speculative_tokens": GUESSES}
EDGES = [
    Request(tokens(100 + length, length), params(length, max_tokens=12, ignore_eos=True))
    for length in (124, 126, 127, 128, 129, 253, 256)
]
"""Their guesses cross the end of a page."""
REPEATED = [Request(tokens(seed, 5) * 8, params(seed, max_tokens=24)) for seed in range(6)]
"""What an n-gram is found in."""
PENALISED = [
    Request(tokens(7, 4) * 5, SamplingParams(max_tokens=24, logprobs=0, **kind))
    for kind in (
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "frequency_penalty": 0.4, "logit_bias": {65: 2.0}},
        {"temperature": 0.7, "presence_penalty": -1.5, "seed": 3},
        {"temperature": 0, "min_tokens": 9, "logit_bias": {256: 60.0}},
        {"temperature": 0.5, "repetition_penalty": 0.8, "min_tokens": 5, "stop_token_ids": range(60, 90)},
    )
]
LONGEST = [
    Request(tokens(9, MAX_LEN - rest), params(rest, max_tokens=None, ignore_eos=True)) for rest in (1, 2, 9)
]
EVERYTHING = REQUESTS + EDGES + REPEATED + PENALISED + LONGEST


class Script:
    """Guesses each sequence's true continuation, as far as it is known, with mistakes at random places."""

    def __init__(self, requests, answers, mistakes: float = 0.0):
        self.rng, self.mistakes = np.random.default_rng(0), mistakes
        self.continuation = {
            id(r.params): a[0].tokens.tolist() for r, a in zip(requests, answers, strict=True)
        }

    def propose(self, limits):
        return {s: self._guess(s, limit) for s, limit in limits.items()}

    def _guess(self, sequence, limit: int) -> list[int]:
        right = self.continuation[id(sequence.params)][sequence.num_output :][:limit]
        wrong = self.rng.random(len(right)) < self.mistakes
        return [(token + int(w)) % VOCAB_SIZE for token, w in zip(right, wrong, strict=True)]

    def follow(self, batch): ...

    def copy_pages(self, sources, targets): ...

    def reset(self): ...


@functools.cache
def undrafted(index: int):
    """A request alone, in a fresh engine without guesses."""
    return run(new_engine(model_of(), max_num_seqs=4), [EVERYTHING[index]])[0]


def expected(requests):
    return [undrafted(EVERYTHING.index(request)) for request in requests]


def drafted(drafter=None, **changes) -> Engine:
    """An engine with this drafter: a name, a model, or an object that guesses."""
    given = drafter is None or isinstance(drafter, str) or hasattr(drafter, "config")
    engine = new_engine(model_of(), drafter=drafter if given else "ngram", **(LIMITS | changes))
    if not given:
        engine._drafter = drafter
    return engine


DRAFTERS = {"ngram": lambda: "ngram", "same": model_of, "other": lambda: model_of(seed=1)}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_everything_at_once(drafter):
    engine = drafted(DRAFTERS[drafter]())
    assert differing(run(engine, EVERYTHING), expected(EVERYTHING)) == 0
    stats = engine.stats()
    assert stats.drafted_tokens > 40 and stats.accepted_tokens > 0
    rate = stats.accepted_tokens / stats.drafted_tokens
    assert {"ngram": rate > 0.1, "same": rate > 0.4, "other": rate < 0.2}[drafter]


@pytest.mark.parametrize("kind", [{"temperature": 0}, {"temperature": 1.0, "seed": 5}])
def test_the_target_itself_guesses_right(kind):
    """Greedy and sampled, from a cold cache and from a prefix that both models find in theirs."""
    request = Request(tokens(3, 200), SamplingParams(max_tokens=21, ignore_eos=True, logprobs=0, **kind))
    reference = run(new_engine(model_of(), max_num_seqs=4), [request])
    engine = drafted(model_of())
    for cached in (0, 199):
        before = engine.stats()
        (sequence,) = engine.add(*request)
        finish(engine)
        stats = engine.stats()
        new = stats.drafted_tokens - before.drafted_tokens
        assert new == stats.accepted_tokens - before.accepted_tokens == 15
        assert sequence.cached == cached and differing([[answer(sequence)]], reference) == 0


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
def test_mistakes_anywhere(mistakes):
    """Guesses that are right for a while, in company: every number of right ones occurs."""
    engine = drafted(Script(EVERYTHING, expected(EVERYTHING), mistakes))
    assert differing(run(engine, EVERYTHING), expected(EVERYTHING)) == 0
    stats = engine.stats()
    rate = stats.accepted_tokens / stats.drafted_tokens
    assert {0.0: rate > 0.8, 0.3: 0.3 < rate < 0.8, 1.0: rate == 0}[mistakes]


def test_ends_inside_right_guesses():
    """By a stop token and by max_tokens, at every place of a group of guesses."""
    prompt = tokens(11, 30)
    base = SamplingParams(temperature=1.0, seed=4, ignore_eos=True, max_tokens=10, logprobs=1)
    (whole,) = run(new_engine(model_of(), max_num_seqs=4), [Request(prompt, base)])[0]
    ids = whole.tokens.tolist()
    assert len(set(ids)) == 10, "a token that occurs twice stops earlier"
    requests, answers = [], []
    for count in range(1, 9):
        for fields, reason in (
            ({"stop_token_ids": [ids[count - 1]]}, "stop"),
            ({"max_tokens": count}, "length"),
            ({"max_tokens": count, "stop_token_ids": [ids[count]]}, "length"),
        ):
            requests.append(Request(prompt, SamplingParams(**vars(base) | fields)))
            answers.append([Answer(*(field[:count] for field in whole[:3]), reason)])
    guesses = [[whole]] * len(requests)
    engine = drafted(Script(requests, guesses))
    assert differing(run(engine, requests), answers) == 0
    assert engine.stats().accepted_tokens > 50


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_preemption(drafter):
    engine = drafted(DRAFTERS[drafter]())
    taken = [engine.pool.allocate() for _ in range(engine.pool.available - 4)]
    some = EDGES + REPEATED[:2]
    queued = [engine.add(*request) for request in some]
    while engine.has_work:
        engine.step()
    engine.pool.release(taken)
    assert engine.stats().preemptions and engine.stats().drafted_tokens
    assert differing([[answer(s) for s in group] for group in queued], expected(some)) == 0


def test_guesses_take_nobodys_page():
    """With the last free page gone, guesses shrink to the room that their sequence has."""
    some = [EDGES[1]]
    engine = drafted(Script(some, expected(some)))
    (sequence,) = engine.add(*some[0])
    engine.step()
    taken = [engine.pool.allocate() for _ in range(engine.pool.available)]
    while not sequence.num_output:
        engine.step()
    assert sequence.length == 127 + 2 == PAGE_SIZE + 1, "one guess fits beside the 127 tokens, not three"
    assert not engine.stats().preemptions
    engine.pool.release(taken)
    finish(engine)
    assert differing([[answer(sequence)]], expected(some)) == 0


def test_failed_step():
    engine = drafted(model_of())
    queued = [engine.add(*request) for request in EDGES[:3]]
    for _ in range(9):
        engine.step()
    working, engine.step_fn = engine.step_fn, None
    with pytest.raises(AttributeError):
        engine.step()
    engine.step_fn = working
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], expected(EDGES[:3])) == 0


@pytest.mark.parametrize("whose", ["target", "drafter"])
def test_poisoned_cache(whose):
    """NaN in one sequence's pages ends that one; NaN in the drafter's cache only spoils guesses."""
    engine = drafted(model_of())
    victim = engine.add(tokens(50, 140), params(1, max_tokens=30, ignore_eos=True))[0]
    queued = [engine.add(*request) for request in EDGES[:3]]
    while not victim.num_output:
        engine.step()
    if whose == "target":
        fill_cache(engine, np.nan, np.array(victim.pages))
    else:
        fill_cache(engine._drafter, np.nan)
    finish(engine)
    assert victim.finish_reason == ("error" if whose == "target" else "length")
    assert engine.stats().drafted_tokens
    assert differing([[answer(s) for s in group] for group in queued], expected(EDGES[:3])) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_drafter_with_broken_weights(value):
    """Whatever it guesses is a token, and wrong guesses cost nothing but time."""
    engine = drafted(model_of())
    step = engine._drafter._step = copy.copy(engine._drafter._step)
    step.state = jax.tree.map(lambda x: jnp.full_like(x, value), step.state)
    some = EDGES[:2] + PENALISED[:2]
    assert differing(run(engine, some), expected(some)) == 0
    assert engine.stats().drafted_tokens


def test_score_and_prompt_logprobs_beside_guesses():
    engine = drafted("ngram")
    prompt = REPEATED[0].prompt
    scored = engine.add_score(prompt)
    (asked,) = engine.add(prompt, SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=2))
    for request in REPEATED:
        engine.add(*request)
    finish(engine)
    alone = new_engine(model_of(), max_num_seqs=4)
    reference = alone.add_score(prompt)
    finish(alone)
    for sequence in (scored, asked):
        assert [e[0] for e in sequence.prompt_logprobs] == [e[0] for e in reference.prompt_logprobs]


@pytest.mark.parametrize("mistakes", [0.0, 0.5])
def test_control_unverified_guesses(monkeypatch, mistakes):
    """Negative control: the comparison sees a wrong guess that is taken for right, and only that."""
    verified = Engine._take_tokens

    def unverified(self, part, row, tokens, usable, out):
        chosen = list(tokens)
        chosen[row : row + len(part.drafts)] = part.drafts
        verified(self, part, row, chosen, usable, out)

    monkeypatch.setattr(Engine, "_take_tokens", unverified)
    engine = drafted(Script(EDGES, expected(EDGES), mistakes))
    assert (differing(run(engine, EDGES), expected(EDGES)) > 0) is bool(mistakes)


def test_control_guesses_do_not_count(monkeypatch):
    """Negative control: penalties that overlook the guesses before a token are noticed."""
    right = arrays._adjusted
    monkeypatch.setattr(arrays, "_adjusted", lambda part, drafts: right(part, []))
    engine = drafted(Script(PENALISED, expected(PENALISED)))
    assert differing(run(engine, PENALISED), expected(PENALISED)) > 0
