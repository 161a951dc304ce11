"""Random requests through the engine: batch (I1), path (I2) and run (I4) do not touch a bit."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdet import LLM, SamplingParams
from jaxdet.testing import VOCAB_SIZE, write_tiny_model

MAX_LEN = 260

settings = hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
prompts = st.builds(
    lambda seed, length: np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist(),
    st.integers(0, 2**32 - 1),
    st.one_of(st.integers(1, 12), st.sampled_from([32, 33, 127, 128, 129, 200])),
)
params = st.builds(
    SamplingParams,
    n=st.integers(1, 2),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_p=st.sampled_from([0.3, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 40]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    seed=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    max_tokens=st.integers(1, 8),
    ignore_eos=st.booleans(),
    logprobs=st.just(2),
    logit_bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.floats(-5, 5), max_size=3),
)
requests = st.tuples(prompts, params)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Few compiled shapes: prefill of 32 tokens, decode of 1, 2 and 4 sequences."""
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", seed=1)
    return LLM(folder, max_model_len=MAX_LEN, max_num_seqs=4, max_num_batched_tokens=32, keep_logits=True)


def answers(llm, batch) -> list[bytes]:
    """Every bit that each request gets back."""
    outputs = llm.generate([p for p, _ in batch], [s for _, s in batch], use_tqdm=False)
    return [
        b"".join(
            np.array(c.token_ids).tobytes()
            + c.logits.tobytes()
            + np.array([e[t].logprob for t, e in zip(c.token_ids, c.logprobs, strict=True)]).tobytes()
            for c in output.outputs
        )
        for output in outputs
    ]


def forget(llm) -> None:
    llm.engine.pool.clear()


@settings
@hypothesis.given(st.lists(requests, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_company_and_order(llm, batch, random):
    """I1: alone, together, and together in another order."""
    alone = []
    for request in batch:
        forget(llm)
        alone += answers(llm, [request])
    forget(llm)
    assert answers(llm, batch) == alone
    order = list(range(len(batch)))
    random.shuffle(order)
    assert answers(llm, [batch[i] for i in order]) == [alone[i] for i in order]


@settings
@hypothesis.given(requests, st.sampled_from([1, 5, 17, 32]), st.integers(0, 8))
def test_path_into_the_cache(llm, request_, chunk, taken):
    """I2: one more prefix hit, other chunks, few pages, and scoring."""
    prompt, sampling = request_
    forget(llm)
    (expected,) = answers(llm, [request_])
    assert answers(llm, [request_]) == [expected], "with its own prefix in the cache"
    scheduler, pool = llm.engine.scheduler, llm.engine.pool
    usual, scheduler.max_num_batched_tokens = scheduler.max_num_batched_tokens, chunk
    pages = [pool.allocate() for _ in range(min(taken, pool.available - 3))]
    try:
        forget(llm)
        assert answers(llm, [request_]) == [expected], "other chunks, fewer pages"
    finally:
        scheduler.max_num_batched_tokens = usual
        pool.release(pages)
    for completion in llm.generate([prompt], sampling, use_tqdm=False)[0].outputs:
        (scored,) = llm.score([[*prompt, *completion.token_ids]])
        sampled = [e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True)]
        assert scored.logprobs[len(prompt) - 1 :] == sampled


@settings
@hypothesis.given(st.lists(requests, min_size=1, max_size=4), st.integers(1, 6))
def test_again_after_an_interruption(llm, batch, steps):
    """I4: the same answers again, after other requests were dropped half-way."""
    expected = answers(llm, batch)
    dropped = [s for prompt, sampling in batch for s in llm.engine.add(prompt[::-1], sampling)]
    for _ in range(steps):
        llm.engine.step()
    for sequence in dropped:
        llm.engine.abort(sequence)
    assert answers(llm, batch) == expected


def test_control_seed_and_bias(llm):
    """Negative control: another seed, and a bias on one token, give other bytes."""
    request = ([1, 2, 3], SamplingParams(seed=1, logprobs=2, max_tokens=8, ignore_eos=True))
    (expected,) = answers(llm, [request])
    for changes in ({"seed": 2}, {"logit_bias": {40: 100.0}}):
        assert answers(llm, [(request[0], SamplingParams(**vars(request[1]) | changes))]) != [expected]
