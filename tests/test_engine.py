"""A request's tokens, log-probabilities and logits are the same bits alone and in any company, path and place."""

import copy
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import (
    MAX_LEN,
    PAGES,
    REQUESTS,
    Answer,
    Request,
    alone,
    answer,
    bits,
    compiled,
    differing,
    fill_cache,
    finish,
    model_of,
    new_engine,
    params,
    run,
    tokens,
    with_flipped_weight,
)

import pallas_kernels.matmul.xla as matmul_xla
from jaxdet.engine.digest import weights_digest
from jaxdet.engine.step import Step
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import FAMILIES


@pytest.fixture(scope="module")
def model():
    return model_of()


def test_mixed_batch(model):
    assert differing(run(new_engine(model), REQUESTS), alone(model)) == 0
    assert differing(run(new_engine(model), REQUESTS[::-1]), alone(model)[::-1]) == 0


def test_prompts_and_decoding_take_turns(model, monkeypatch):
    """Beside more rows than are mixed with prompts: other programs in another order, the same bits."""
    monkeypatch.setattr("jaxdet.engine.buckets.MIXED_ROWS", (1, 2))
    engine, kinds = new_engine(model), []
    plans = engine.scheduler.schedule

    def schedule(*args):
        plan = plans(*args)
        kinds.append((len(plan.rows), len(plan.chunks)))
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", schedule)
    assert differing(run(engine, REQUESTS), alone(model)) == 0
    assert max(rows for rows, chunks in kinds if chunks) == 2 and max(kinds)[0] > 2


def churn(model, requests, expected, rng, **config) -> None:
    """Requests join at random steps, some are aborted at random ones, and pages are short."""
    engine = new_engine(model, **config)
    kept = [engine.pool.allocate() for _ in range(engine.pool.available - 9)]
    waiting, live = list(enumerate(requests)), {}
    while waiting or engine.has_work:
        for _ in range(int(rng.integers(0, 4))):
            if waiting:
                index, request = waiting.pop(0)
                live[index] = engine.add(*request)
        engine.step()
        if rng.random() < 0.05 and live:
            engine.abort(live[rng.choice(list(live))][0])
    engine.pool.release(kept)
    assert engine.pool.available == engine.pool.num_pages - 1
    aborted = 0
    for index, sequences in live.items():
        for sequence, reference in zip(sequences, expected[index], strict=True):
            found, n = answer(sequence), sequence.num_output
            aborted += found.finish_reason == "abort"
            if found.finish_reason == "abort":
                reference = Answer(*(field[:n] for field in reference[:3]), "abort")
            assert differing([[found]], [[reference]]) == 0, index
    assert engine.scheduler.preemptions, "pages were not short"


def test_joining_leaving_and_preemption(model):
    churn(model, REQUESTS * 2, alone(model) * 2, np.random.default_rng(0))


@pytest.mark.parametrize("budget", [1, 48, 512])
def test_chunk_sizes(model, budget):
    some = (4, 11)
    engine = new_engine(model, max_num_batched_tokens=budget)
    found = [run(engine, [REQUESTS[i]])[0] for i in some]
    assert differing(found, alone(model, some)) == 0


def test_chunked_prefill_off(model):
    engine = new_engine(model, max_num_batched_tokens=512, enable_chunked_prefill=False)
    some = (4, 11)
    assert differing([run(engine, [REQUESTS[i]])[0] for i in some], alone(model, some)) == 0


def test_prefix_cache_hit(model):
    """The same prompt again, whose last page is copied, and another prompt that shares two pages with it."""
    engine = new_engine(model)
    index = len(REQUESTS) - 1
    other = Request([*REQUESTS[index].prompt[:257], 5, 6, 7], params(2))
    expected = [*alone(model, [index]), run(new_engine(model, enable_prefix_caching=False), [other])[0]]
    for request, reference, cached in ((REQUESTS[index], expected[0], 0), (other, expected[1], 256)):
        for hit in (cached, len(request.prompt) - 1):
            (sequence,) = engine.add(*request)
            finish(engine)
            assert sequence.cached == hit
            assert differing([[answer(sequence)]], [reference]) == 0


def test_preemption(model):
    engine = new_engine(model)
    taken = [engine.pool.allocate() for _ in range(PAGES - 1 - 4)]
    some = (5, 6, 7, 6, 5)
    queued = [engine.add(*REQUESTS[i]) for i in some]
    while engine.has_work:
        engine.step()
    engine.pool.release(taken)
    assert engine.scheduler.preemptions
    assert differing([[answer(s) for s in group] for group in queued], alone(model, some)) == 0


def test_fragmented_pages(model):
    """Pages in another order than ever in a fresh engine."""
    engine = new_engine(model)
    order = np.random.default_rng(1).permutation(list(engine.pool._free)).tolist()
    engine.pool._free = type(engine.pool._free)((page, None) for page in order)
    assert differing(run(engine, REQUESTS), alone(model)) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_old_contents_of_pages(model, value):
    engine = new_engine(model)
    fill_cache(engine, value)
    assert differing(run(engine, REQUESTS), alone(model)) == 0


def test_poisoned_neighbour(model):
    """A sequence whose cache turns to NaN ends with "error", alone; its pages serve the next as if nothing were."""
    engine = new_engine(model)
    some = (5, 7, 8)
    victim = engine.add(REQUESTS[10].prompt, params(1, max_tokens=20))[0]
    others = [engine.add(*REQUESTS[i]) for i in some]
    while not victim.num_output:
        engine.step()
    pages = list(victim.pages)
    fill_cache(engine, np.nan, np.array(pages))
    finish(engine)
    assert victim.finish_reason == "error" and len(victim.logprobs) == victim.num_output
    assert differing([[answer(s) for s in group] for group in others], alone(model, some)) == 0
    engine.pool._free = type(engine.pool._free)(
        (p, None) for p in (*pages, *(q for q in engine.pool._free if q not in pages))
    )
    (again,) = engine.add(*REQUESTS[10])
    finish(engine)
    assert again.cached == 0, "a poisoned page was found by its prefix"
    assert differing([[answer(again)]], alone(model, [10])) == 0


def test_no_prompt_logprob_of_a_failed_sequence_counts(model):
    """Which of them a NaN reached is up to the chunks that the prompt came in."""
    engine = new_engine(model)
    prompt = [1 + i % 50 for i in range(3 * engine.scheduler.max_num_batched_tokens)]
    (victim,) = engine.add(prompt, params(1, prompt_logprobs=2, max_tokens=2))
    while not victim.prompt_logprobs:
        engine.step()
    assert np.isfinite(victim.prompt_logprobs[0][0])
    fill_cache(engine, np.nan, np.array(victim.pages))
    finish(engine)
    assert victim.finish_reason == "error" and len(victim.prompt_logprobs) == len(prompt) - 1
    assert all(np.isnan(entry[0]) for entry in victim.prompt_logprobs)


def test_shapes_of_the_engine(model):
    """Other limits mean other compiled shapes."""
    some = (1, 8)
    wide = new_engine(model, max_model_len=2048, max_num_seqs=3, num_pages=50)
    assert differing(run(wide, [REQUESTS[i] for i in some]), alone(model, some)) == 0


def test_compiled_variants(model):
    """Asking for logprobs and a batch-mate's biases change the compiled program, not the bits."""
    mine = Request(REQUESTS[2].prompt, SamplingParams(temperature=0.8, seed=3, max_tokens=6))
    ((reference,),) = run(new_engine(model), [mine])
    for logprobs, biases in ((None, 0), (None, 1), (20, 0), (20, 40)):
        mate = SamplingParams(logit_bias=dict.fromkeys(range(biases), 1.0), logprobs=logprobs, max_tokens=6)
        (found,), _ = run(new_engine(model), [mine, Request([1, 2, 3], mate)])
        assert differing([[found]], [[reference]]) == 0


def test_logits_kept_or_not(model):
    engine = new_engine(model)
    engine.keep_logits = False
    (sequence,) = engine.add(*REQUESTS[3])
    finish(engine)
    reference = alone(model, [3])[0][0]
    assert not sequence.logits and sequence.output == reference.tokens.tolist()
    assert [e[0] for e in sequence.logprobs] == reference.logprobs.tolist()


def test_samples_of_one_request(model):
    """n samples differ, finish apart, and do not depend on how many there are."""
    p = params(1, max_tokens=24, stop_token_ids=list(range(60, 75)))
    several = run(new_engine(model), [Request([7, 8, 9], SamplingParams(**vars(p) | {"n": 4}))])[0]
    assert len({tuple(a.tokens) for a in several}) == 4
    assert len({len(a.tokens) for a in several}) > 1
    again = run(new_engine(model), [*REQUESTS[:3], Request([7, 8, 9], SamplingParams(**vars(p) | {"n": 2}))])[
        -1
    ]
    one = run(new_engine(model), [Request([7, 8, 9], p)])[0]
    assert differing([again], [several[:2]]) == 0
    assert differing([one], [several[:1]]) == 0


def test_score_equals_sampler(model):
    """Scoring prompt and output gives the sampler's logprobs, whatever else runs and however it is chunked."""
    for budget, company in ((32, []), (32, REQUESTS[:6]), (1, [])):
        engine = new_engine(model, max_num_batched_tokens=budget)
        some = (1, 6, 9) if budget > 1 else (1,)
        scored = [
            engine.add_score([*REQUESTS[i].prompt, *alone(model, [i])[0][0].tokens.tolist()]) for i in some
        ]
        for request in company:
            engine.add(*request)
        finish(engine)
        for sequence, i in zip(scored, some, strict=True):
            assert sequence.num_output == 0 and sequence.finish_reason == "length"
            assert len(sequence.prompt_logprobs) == len(sequence.prompt) - 1
            sampled = alone(model, [i])[0][0].logprobs
            found = np.array([e[0] for e in sequence.prompt_logprobs[-len(sampled) :]], np.float32)
            np.testing.assert_array_equal(bits(found), bits(sampled))


def test_prompt_logprobs(model):
    """The same as score's, also for a prompt that is in the prefix cache, and after a preemption."""
    engine = new_engine(model)
    prompt = REQUESTS[11].prompt
    scored = engine.add_score(prompt)
    finish(engine)
    first = np.array([e[0] for e in scored.prompt_logprobs], np.float32)
    for p in (params(0, prompt_logprobs=0), params(1, prompt_logprobs=20)):
        (sequence,) = engine.add(prompt, p)
        finish(engine)
        found = np.array([e[0] for e in sequence.prompt_logprobs], np.float32)
        np.testing.assert_array_equal(bits(found), bits(first))
        assert all(len(e[2]) == p.prompt_logprobs for e in sequence.prompt_logprobs)


def test_whole_context_is_used_and_scored(model):
    engine = new_engine(model)
    (sequence,) = engine.add(tokens(9, MAX_LEN - 3), params(0, max_tokens=None, ignore_eos=True))
    finish(engine)
    assert len(sequence.tokens) == MAX_LEN and sequence.finish_reason == "length"
    scored = engine.add_score(sequence.tokens)
    finish(engine)
    assert [e[0] for e in scored.prompt_logprobs[-3:]] == [e[0] for e in sequence.logprobs]


def test_abort_anywhere(model):
    """While waiting, between chunks, while decoding, and after the end."""
    engine = new_engine(model, max_num_seqs=2)
    queued = [engine.add(*REQUESTS[i])[0] for i in (4, 10, 2, 3, 1)]
    engine.abort(queued[3])
    engine.step()
    engine.abort(queued[1])
    while not queued[0].num_output:
        engine.step()
    engine.abort(queued[0])
    finish(engine)
    engine.abort(queued[2])
    assert [s.finish_reason for s in queued] == ["abort", "abort", "length", "abort", "length"]
    assert differing([[answer(queued[2])], [answer(queued[4])]], alone(model, (2, 1))) == 0


@pytest.mark.parametrize("at", [0, 3, 6])
def test_failed_step_leaves_a_clean_engine(model, at):
    engine = new_engine(model)
    queued = [engine.add(*request) for request in REQUESTS[:6]]
    for _ in range(at):
        engine.step()
    working = engine.step_fn

    def fail(cache, *args, **flags):
        jax.tree.map(lambda x: x.delete(), cache)  # as a step does that took the donated cache and failed
        raise RuntimeError("out of memory")

    engine.step_fn = copy.copy(working)
    engine.step_fn.run = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()
    engine.step_fn = working
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], alone(model, range(6))) == 0


def test_interrupted_bookkeeping(model, monkeypatch):
    """An exception after some sequences took their tokens and before others did."""
    engine = new_engine(model)
    queued = [engine.add(*request) for request in REQUESTS[1:5]]
    while not all(group[0].num_output for group in queued):
        engine.step()
    victim, append = queued[2][0], type(queued[2][0]).append

    def interrupted(self, token):
        if self is victim:
            raise KeyboardInterrupt
        append(self, token)

    with monkeypatch.context() as patch:
        patch.setattr(type(victim), "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], alone(model, range(1, 5))) == 0


def test_nobody_starves(model):
    """A decoding sequence goes on while new prompts keep coming."""
    engine = new_engine(model, max_num_seqs=4)
    (first,) = engine.add([1, 2], params(0, max_tokens=30, ignore_eos=True))
    for step in range(400):
        if len(engine.scheduler.waiting) < 4:
            engine.add(tokens(step, 40), params(1, max_tokens=2))
        engine.step()
        if first.finish_reason:
            break
    assert first.finish_reason == "length"


def test_prefix_hash_has_the_weights(model):
    """The digest of the weights sees one flipped bit, a swap and another dtype."""
    state = compiled(model).state
    digest = weights_digest(state)
    assert digest == weights_digest(jax.tree.map(lambda x: x.copy(), state))
    leaves, tree = jax.tree.flatten(state)
    for place in (0, len(leaves) - 1):
        flat = np.asarray(leaves[place]).copy()
        flat.reshape(-1).view(np.uint32)[-1] ^= 1
        changed = list(leaves)
        changed[place] = jnp.asarray(flat)
        assert weights_digest(jax.tree.unflatten(tree, changed)) != digest
    twisted = [leaves[0][..., ::-1], *leaves[1:]]
    assert weights_digest(jax.tree.unflatten(tree, twisted)) != digest
    assert weights_digest(compiled(model_of(dtype=jnp.bfloat16)).state) != digest


def test_control_one_weight_bit(model):
    """Negative control: the comparison sees the lowest bits of one weight matrix change."""
    engine = new_engine(model)
    step = with_flipped_weight(compiled(model))
    engine.step_fn = step
    assert differing([run(engine, [REQUESTS[4]])[0]], alone(model, [4])) > 0


def test_control_plain_matmul(monkeypatch):
    """Negative control: with `jnp.dot` in the place of our product, company shows."""
    model = model_of(hidden_size=576, num_hidden_layers=1)

    def plain(x, w, n):
        if matmul_xla.rows_are_free():
            w = matmul_xla.unpack(w, x.shape[1], n)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)[:, :n]

    for dot, harmless in ((matmul_xla.dot, True), (plain, False)):
        monkeypatch.setattr(matmul_xla, "dot", dot)
        step = Step(model)

        def answers(requests, step=step):
            engine = new_engine(model)
            engine.step_fn = step
            return run(engine, requests)

        one = [answers([REQUESTS[i]])[0] for i in (2, 3)]
        assert (differing(answers([REQUESTS[2], REQUESTS[3]]), one) == 0) is harmless


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), zip(FAMILIES, itertools.cycle([jnp.float32, jnp.bfloat16])))
def test_64_sequences_of_every_family(family, dtype):
    model = model_of(family, dtype)
    requests = [Request(tokens(i, 1 + (i * 37) % 290), params(i, max_tokens=4 + i % 13)) for i in range(80)]
    expected = [run(new_engine(model), [request])[0] for request in requests]
    config = {"max_num_seqs": 64, "max_num_batched_tokens": 256}
    assert differing(run(new_engine(model, **config, num_pages=PAGES * 4), requests), expected) == 0
    churn(model, requests, expected, np.random.default_rng(3), **config)
