"""Constrained completions: masks of allowed tokens leave no trace on anybody else and obey the contract themselves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import (
    EOS,
    PAGES,
    Request,
    answer,
    bits,
    compiled,
    differing,
    model_of,
    new_engine,
    params,
    run,
    tokens,
)

from jaxdet.grammar import JsonConstraint, JsonGrammars
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import VOCAB_SIZE, byte_tokenizer
from jaxdet.verify.hlo import lint
from pallas_kernels.sample.op import restrict

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def grammars():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token_ids = (EOS,)  # as the engine has it
    return JsonGrammars(tokenizer, VOCAB_SIZE)


def test_restrict_keeps_the_bits_of_what_is_allowed():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 70)).astype(np.float32)
    logits[1], logits[2], logits[0, 3] = np.nan, np.inf, -0.0
    allowed = rng.integers(0, 2**32, (5, 3), np.uint64).astype(np.uint32)
    allowed[3] = 0xFFFFFFFF
    found = np.asarray(restrict(jnp.asarray(logits), allowed))
    keep = (allowed[:, np.arange(70) // 32] >> (np.arange(70) % 32).astype(np.uint32)) & 1 == 1
    assert (bits(found)[keep] == bits(logits)[keep]).all() and (found[~keep] == -np.inf).all()
    assert keep[3].all() and not keep.all()


@pytest.mark.parametrize("vocab", [VOCAB_SIZE, 287, 288, 289])
def test_a_mask_has_a_bit_for_every_logit(vocab):
    """Real vocabularies are multiples of 32, the tiny model's is not."""
    mask = JsonGrammars(byte_tokenizer(), vocab).compile(SCHEMA).allowed([])
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocab // 32),)


def constrained(model, grammars, others=(), *, count=3, hidden_pages=0, **engine):
    """The answers of some constrained requests that join others, and what they wrote."""
    queue = new_engine(model, **engine)
    hidden = [queue.pool.allocate() for _ in range(hidden_pages)]
    for other in others:
        queue.add(*other)
    for _ in range(min(len(others), 2)):
        queue.step()
    queued = [
        queue.add(
            tokens(40 + i, 90 + 30 * i),
            SamplingParams(temperature=0.9, seed=i, max_tokens=60, logprobs=2, n=2, frequency_penalty=i % 2),
            constraint=grammars.compile(SCHEMA),
        )
        for i in range(count)
    ]
    while queue.has_work:
        queue.step()
    queue.pool.release(hidden)
    assert queue.pool.available == queue.pool.num_pages - 1
    assert bool(queue.scheduler.preemptions) == bool(hidden_pages)
    texts = [byte_tokenizer().decode(s.output) for sequences in queued for s in sequences]
    return [[answer(s) for s in sequences] for sequences in queued], texts


def test_constrained_requests_in_any_company(model, grammars):
    alone, texts = constrained(model, grammars)
    for text in texts:
        found = json.loads(text)
        assert sorted(found) == ["name", "ok"] and isinstance(found["ok"], bool)
    assert len(set(texts)) > 1
    assert {a.finish_reason for sequences in alone for a in sequences} == {"stop"}
    others = [Request(tokens(i, 30 + 9 * i), params(i)) for i in range(6)]
    crowded, _ = constrained(model, grammars, others)
    assert differing(crowded, alone) == 0
    preempted, _ = constrained(model, grammars, others, hidden_pages=PAGES - 1 - 4)
    assert differing(preempted, alone) == 0


def test_guesses_are_checked_against_the_grammar(model, grammars):
    alone, _ = constrained(model, grammars, count=1)
    guessed, _ = constrained(
        model, grammars, count=1, drafter="ngram", max_num_seqs=2, num_speculative_tokens=2
    )
    assert differing(guessed, alone) == 0


def test_the_program_passes_the_lint(model, grammars):
    constrained(model, grammars, count=1)
    step = compiled(model)
    found = {key: program for key, program in step.programs.items() if key[0] == "restrict"}
    assert found and lint({str(key): program for key, program in found.items()}, "xla").ok


def test_others_never_notice(model, grammars):
    others = [Request(tokens(i, 30 + 9 * i), params(i)) for i in range(6)]
    expected = run(new_engine(model), others)
    engine = new_engine(model)
    engine.add(tokens(9, 9), SamplingParams(max_tokens=60), constraint=grammars.compile(SCHEMA))
    assert differing(run(engine, others), expected) == 0


def test_control_a_forgotten_mask_is_seen(model, grammars, monkeypatch):
    alone, _ = constrained(model, grammars)
    monkeypatch.setattr("jaxdet.engine.batch.allowed_tokens", lambda *_: None)
    assert differing(constrained(model, grammars)[0], alone) > 0


def test_a_grammar_that_fails_ends_its_own_request(model, grammars):
    class Nothing:
        def allowed(self, guesses):
            return np.zeros(-(-VOCAB_SIZE // 32), np.uint32)

        def append(self, token):
            raise AssertionError("nothing may be chosen")

        def copy(self):
            return self

    engine = new_engine(model)
    (failed,) = engine.add(tokens(1, 9), SamplingParams(max_tokens=5), constraint=Nothing())
    other = Request(tokens(2, 30), params(2))
    assert differing(run(engine, [other]), run(new_engine(model), [other])) == 0
    assert (failed.finish_reason, failed.output) == ("error", [])


@pytest.mark.parametrize("before", [True, False])
def test_ctrl_c_between_a_token_and_its_grammar(model, grammars, before):
    """The token is there, and the grammar has taken it or not: it starts over from the tokens."""

    class Interrupted(JsonConstraint):
        left = 5

        def append(self, token):
            Interrupted.left -= 1
            if not Interrupted.left and before:
                raise KeyboardInterrupt
            super().append(token)
            if not Interrupted.left:
                raise KeyboardInterrupt

    def answers(constraint, interrupted):
        engine = new_engine(model)
        queued = engine.add(tokens(3, 40), SamplingParams(seed=2, max_tokens=60, n=2), constraint=constraint)
        while engine.has_work:
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupted.append(True)
        return [[answer(s) for s in queued]]

    times: list[bool] = []
    expected = answers(grammars.compile(SCHEMA), times)
    assert not times
    assert (
        differing(
            answers(Interrupted(grammars.compile(SCHEMA)._matcher, -(-VOCAB_SIZE // 32)), times), expected
        )
        == 0
    )
    assert times == [True]


@pytest.mark.parametrize("change", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_a_banned_end_is_refused(model, grammars, change):
    with pytest.raises(ValueError, match="constrained completion"):
        new_engine(model).add([1], SamplingParams(**change), constraint=grammars.compile(SCHEMA))


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://example.com/x"}, {"type": "string", "pattern": "("}]
)
def test_unusable_schemas(grammars, schema):
    with pytest.raises(ValueError, match="json_schema can't be followed") as caught:
        grammars.compile(schema)
    assert "\n" not in str(caught.value)


def test_the_end_is_allowed_only_at_the_end(grammars):
    constraint = grammars.compile(SCHEMA)
    end = lambda guesses: constraint.allowed(guesses)[EOS // 32] >> EOS % 32 & 1  # noqa: E731
    text = byte_tokenizer().encode('{"name":"a","ok":true}')
    assert not end([]) and not end(text[:-1]) and end(text)
    assert not constraint.allowed([*text, text[0]]).any()
