"""Hundreds of random requests under pressure, every one equal in all bits to itself alone; 1000 that must be one."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import soak
from engine_runs import compiled, model_of, with_flipped_weight

from jaxdet import LLM, SamplingParams
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.scheduler import Scheduler
from jaxdet.engine.step import Step
from jaxdet.testing import VOCAB_SIZE

POISON = VOCAB_SIZE - 2
LIMITS = {
    "max_num_seqs": 5,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "num_pages": 21,
    "num_speculative_tokens": 2,
}


@functools.cache
def engines() -> soak.Engines:
    """The drafter has the target's weights, all but the poison, so that many guesses are right."""
    model, small = soak.poisoned(model_of(seed=0), POISON), model_of()
    return soak.Engines(compiled(model), compiled(small), model, small, LIMITS)


def test_210_requests():
    """Preempted, cancelled, guessed, beside NaN, more than half of the prompts from the cache: no bit differs."""
    result = soak.soak(engines(), 210, seed=1, poison=POISON, alone=210, free_pages=9)
    assert soak.shortcomings(result) == [], result
    assert result["alone"] == 210 and result["compared"] > 50_000
    assert result["rounds"]["model"]["accepted"] > result["rounds"]["model"]["drafted"] / 4


def test_in_turns(monkeypatch):
    """The same where prompts and rows, guesses included, hardly ever share a step."""
    monkeypatch.setattr("jaxdet.engine.buckets.MIXED_ROWS", (1, 3))
    apart, take_turns = [], Scheduler._take_turns

    def noted(*args):
        apart.append(take_turns(*args))
        return apart[-1]

    monkeypatch.setattr(Scheduler, "_take_turns", noted)
    result = soak.soak(engines(), 45, seed=2, poison=POISON, alone=0, free_pages=9)
    assert result["differing"] == 0 < result["compared"] and sum(apart) > 20


def test_control_one_weight_bit():
    """Negative control: with the lowest bits of one weight matrix flipped, the soak's comparison sees it."""
    jobs = soak.traffic(12, seed=5, max_len=512, poison=POISON, rate=1.0)
    right = soak.run(engines().new(), jobs)
    step = with_flipped_weight(engines().step)
    engine = engines().new()
    engine.step_fn = step
    assert soak.differing(right, right)[1] == 0 < soak.differing(soak.run(engine, jobs), right)[1]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_smollm2(demo_model):
    """The same with real weights."""
    model, small = soak.load(demo_model, dtype=jnp.dtype("float32"), backend=None, max_model_len=384)
    poison = model.config.vocab_size - 2
    step = Step(soak.poisoned(model, poison))
    result = soak.soak(
        soak.Engines(step, Step(small), model, small, LIMITS | {"max_model_len": 384}),
        30,
        seed=16,
        poison=poison,
        alone=30,
        free_pages=6,
        rounds=("none", "ngram"),
    )
    print(result)
    assert result["differing"] == 0 and result["alone"] == 30
    for count in ("preemptions", "cancelled", "poisoned", "drafted", "accepted"):
        assert sum(found[count] for found in result["rounds"].values()), count


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_1000_completions_of_one_prompt(demo_model, record_property):
    """They arrive staggered, greedy or with equal seeds: one completion, all log-probabilities included."""
    llm = LLM(demo_model, max_model_len=256, max_num_seqs=64)
    ids = llm.tokenizer.encode("Once upon a time there was a")
    for fields in ({"temperature": 0}, {"temperature": 1, "seed": 7}):
        params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0, **fields)
        rng, requests = np.random.default_rng(0), []
        while len(requests) < 1000 or not all(r.finished for r in requests):
            for _ in range(min(int(rng.integers(0, 40)), 1000 - len(requests))):
                requests.append(llm.submit(ids, params))
            llm.step()
        sequences = [s for request in requests for s in request.sequences]
        assert len(sequences) == 1000
        assert len({(*s.output, *(e[0] for e in s.logprobs)) for s in sequences}) == 1
        for request in requests:
            llm.abort(request)
    del llm

    plain = Baseline(open_checkpoint(demo_model), dtype="float32", max_model_len=32)
    found = []
    for size, times in ((64, 13), (33, 4), (8, 4), (3, 1), (1, 1)):
        for _ in range(times):
            found += plain.generate([ids] * size, 5)
    unique = len({logits.tobytes() for _, logits in found})
    record_property("plain JAX: unique of 1000", unique)
    print(f"1000 completions of one prompt, all bits: jaxdet 1 unique, plain JAX {unique}")
    assert len(found) == 1000 and unique > 1, "plain JAX shows no difference on this machine"
