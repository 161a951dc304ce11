"""The offline API with a tiny model: texts, prompts, stops, streams, scores and the errors for bad input."""

import itertools

import numpy as np
import pytest

import jaxdet
from jaxdet import LLM, SamplingParams
from jaxdet.testing import VOCAB_SIZE, write_tiny_model
from jaxdet.text import TextStream

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, max_tokens=20, seed=5, ignore_eos=True)
PROMPT = "Hello there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_model_len=300, max_num_seqs=4, max_num_batched_tokens=64)


def generate(llm, prompts, params=GREEDY, **changes):
    params = SamplingParams(**vars(params) | changes)
    return llm.generate(prompts, params, use_tqdm=False)


def completion(llm, prompt, params=GREEDY, **changes):
    return generate(llm, prompt, params, **changes)[0].outputs[0]


def text_of(llm, ids) -> str:
    return llm.tokenizer.decode(ids)


def test_every_form_of_a_prompt(llm):
    ids = llm.tokenizer.encode(PROMPT)
    expected = completion(llm, PROMPT)
    forms = [PROMPT, ids, np.array(ids), {"prompt": PROMPT}, {"prompt_token_ids": ids}, tuple(ids)]
    for form in forms:
        (one,) = generate(llm, form)
        assert one.prompt_token_ids == ids and one.outputs[0].token_ids == expected.token_ids
    many = generate(llm, forms)
    assert [o.outputs[0].token_ids for o in many] == [expected.token_ids] * len(forms)
    assert [o.prompt for o in many] == [PROMPT, None, None, PROMPT, None, None]
    assert generate(llm, np.array([ids, ids]))[1].outputs[0].token_ids == expected.token_ids


def test_results_come_in_the_prompts_order(llm):
    prompts = ["a" * n for n in (200, 1, 90, 5, 140, 2, 3)]
    outputs = generate(llm, prompts, SEEDED)
    assert [o.prompt for o in outputs] == prompts
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finished and output.outputs[0] == completion(llm, prompt, SEEDED)


def test_one_params_per_prompt(llm):
    both = llm.generate([PROMPT, PROMPT], [GREEDY, SEEDED], use_tqdm=False)
    assert [o.outputs[0] for o in both] == [completion(llm, PROMPT), completion(llm, PROMPT, SEEDED)]
    assert both[0].outputs[0].token_ids != both[1].outputs[0].token_ids


def test_seeds(llm, folder):
    a, b = generate(llm, [PROMPT, PROMPT], SEEDED)
    assert a.outputs == b.outputs, "identical requests give identical answers"
    assert completion(llm, PROMPT, SEEDED, seed=6).token_ids != a.outputs[0].token_ids
    assert completion(llm, PROMPT, SEEDED, seed=2**63 + 5).token_ids != a.outputs[0].token_ids
    by_engine = completion(llm, PROMPT, SEEDED, seed=None)
    assert by_engine == completion(llm, PROMPT, SEEDED, seed=0)
    llm.engine.seed, saved = 5, llm.engine.seed
    assert completion(llm, PROMPT, SEEDED, seed=None) == a.outputs[0]
    llm.engine.seed = saved


def test_several_samples(llm):
    (output,) = generate(llm, PROMPT, SEEDED, n=4)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4
    assert output.outputs[0] == completion(llm, PROMPT, SEEDED)
    (greedy,) = generate(llm, PROMPT, GREEDY, n=3)
    assert len({tuple(o.token_ids) for o in greedy.outputs}) == 1


def test_cold_and_narrow_sampling_is_greedy(llm):
    greedy = completion(llm, PROMPT).token_ids
    for changes in (
        {"temperature": 1e-6},
        {"temperature": 1e-5},
        {"top_k": 1},
        {"top_p": 1e-60},
        {"top_p": 1e-6},
        {"min_p": 1.0},
    ):
        assert (
            completion(llm, PROMPT, GREEDY, **{"temperature": 1.0, "seed": 3} | changes).token_ids == greedy
        ), changes


def test_hot_sampling_differs(llm):
    assert completion(llm, PROMPT, SEEDED, temperature=1e9).token_ids != completion(llm, PROMPT).token_ids


def test_logit_bias(llm):
    assert completion(llm, PROMPT, logit_bias={65: 100}).token_ids == [65] * 20
    ids = completion(llm, PROMPT).token_ids
    assert ids[0] not in completion(llm, PROMPT, logit_bias={ids[0]: -100}).token_ids


def test_penalties(llm):
    plain = completion(llm, PROMPT, max_tokens=40).token_ids
    for changes in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 3}):
        penalised = completion(llm, PROMPT, max_tokens=40, **changes).token_ids
        assert len(set(penalised)) > len(set(plain)), changes
    # The prompt counts for the repetition penalty and for no other.
    first = plain[0]
    prompt = [*llm.tokenizer.encode(PROMPT)]
    again = completion(llm, [*prompt, first], max_tokens=1).token_ids[0]
    for changes, same in (({"frequency_penalty": 2}, True), ({"presence_penalty": 2}, True)):
        assert (completion(llm, [*prompt, first], max_tokens=1, **changes).token_ids[0] == again) is same
    repeated = [*prompt, again]
    best = completion(llm, repeated, max_tokens=1).token_ids[0]
    banned = completion(llm, [*repeated, best], max_tokens=1, repetition_penalty=100)
    assert banned.token_ids[0] not in {*repeated, best}


def test_stop_strings(llm):
    """Across tokens (a token is a byte), at their first place, kept or not."""
    whole = completion(llm, PROMPT)
    stop = whole.text[5:8]
    at = whole.text.index(stop)
    found = completion(llm, PROMPT, stop=["never", stop])
    assert (found.text, found.finish_reason, found.stop_reason) == (whole.text[:at], "stop", stop)
    assert found.token_ids == whole.token_ids[: at + 3]
    kept = completion(llm, PROMPT, stop=stop, include_stop_str_in_output=True)
    assert kept.text == whole.text[: at + 3] and kept.token_ids == found.token_ids
    last = completion(llm, PROMPT, stop=whole.text[-2:])
    assert last.finish_reason in ("stop", "length") and whole.text.startswith(last.text)


def test_stop_at_the_last_token_is_a_stop(llm):
    whole = completion(llm, PROMPT, max_tokens=6)
    stop = whole.text[3:6]
    assert whole.text.index(stop) == 3
    assert completion(llm, PROMPT, max_tokens=6, stop=stop).finish_reason == "stop"


def test_stop_token_ids(llm):
    whole = completion(llm, PROMPT)
    token = whole.token_ids[4]
    first = whole.token_ids.index(token)
    found = completion(llm, PROMPT, stop_token_ids=[token])
    assert (found.finish_reason, found.stop_reason) == ("stop", token)
    assert found.token_ids == whole.token_ids[: first + 1] and found.text == whole.text[:first]
    kept = completion(llm, PROMPT, stop_token_ids=[token], include_stop_str_in_output=True)
    assert kept.text == whole.text[: first + 1]


def test_end_of_sequence(llm):
    eos = llm.tokenizer.eos_token_ids[0]
    bias = {eos: 100.0}
    ended = completion(llm, PROMPT, ignore_eos=False, logit_bias=bias)
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([eos], "", "stop", None)
    going = completion(llm, PROMPT, ignore_eos=True, logit_bias=bias)
    assert (going.token_ids, going.finish_reason) == ([eos] * 20, "length")
    assert completion(llm, PROMPT, logit_bias=bias, skip_special_tokens=False).text == "<|endoftext|>" * 20


def test_min_tokens(llm):
    eos = llm.tokenizer.eos_token_ids[0]
    late = completion(llm, PROMPT, ignore_eos=False, min_tokens=5, logit_bias={eos: 100.0})
    assert len(late.token_ids) == 6 and eos not in late.token_ids[:5]
    whole = completion(llm, PROMPT, max_tokens=40)
    stop = next(c for c in whole.text if whole.text.count(c) > 1)
    first, second = whole.text.index(stop), whole.text.index(stop, whole.text.index(stop) + 1)
    assert completion(llm, PROMPT, stop=stop).text == whole.text[:first]
    assert completion(llm, PROMPT, max_tokens=40, stop=stop, min_tokens=first + 1).text == whole.text[:second]
    ids = whole.token_ids
    late = completion(llm, PROMPT, stop_token_ids=[ids[0]], min_tokens=3)
    assert ids[0] not in late.token_ids[:3]


def test_max_tokens_none_fills_the_context(llm):
    output = completion(llm, "x" * 290, max_tokens=None)
    assert len(output.token_ids) == 10 and output.finish_reason == "length"


def test_logprobs(llm):
    whole = completion(llm, PROMPT)
    (output,) = generate(llm, PROMPT, GREEDY, logprobs=3, prompt_logprobs=2)
    (mine,) = output.outputs
    assert mine.token_ids == whole.token_ids and whole.logprobs is None
    for token, entry in zip(mine.token_ids, mine.logprobs, strict=True):
        assert next(iter(entry)) == token and entry[token].rank == 1 and len(entry) == 3
        assert entry[token].decoded_token == text_of(llm, [token])
        assert [e.rank for e in entry.values()] == [1, 2, 3]
    assert mine.cumulative_logprob == sum(
        e[t].logprob for t, e in zip(mine.token_ids, mine.logprobs, strict=True)
    )
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    (scored,) = llm.score([output.prompt_token_ids + mine.token_ids])
    chosen = [
        *(e[t].logprob for t, e in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)),
        *(e[t].logprob for t, e in zip(mine.token_ids, mine.logprobs, strict=True)),
    ]
    assert scored.logprobs == chosen
    everything = completion(llm, PROMPT, max_tokens=1, logprobs=20).logprobs[0]
    assert len(everything) == 20 and sum(np.exp(e.logprob) for e in everything.values()) <= 1 + 1e-5


def test_score_of_the_shortest_and_longest(llm):
    assert llm.score([[5]])[0].logprobs == []
    scored = llm.score([[5] * 300, [6, 7]])
    assert [len(s.logprobs) for s in scored] == [299, 1]
    assert scored[1].logprobs == llm.score([[6, 7]])[0].logprobs


def test_stream_equals_generate(llm):
    stop = completion(llm, PROMPT, SEEDED).text[9:12]
    for changes in ({}, {"stop": stop}, {"n": 3}, {"stop": ["€", stop + "?"], "logprobs": 2}):
        params = SamplingParams(**vars(SEEDED) | changes)
        parts = list(llm.stream(PROMPT, params))
        expected = llm.generate(PROMPT, params, use_tqdm=False)[0]
        assert parts[-1].outputs == expected.outputs and parts[-1].finished
        assert not any(p.finished for p in parts[:-1])
        for before, after in itertools.pairwise(parts):
            for a, b in zip(before.outputs, after.outputs, strict=True):
                assert b.text.startswith(a.text) and b.token_ids[: len(a.token_ids)] == a.token_ids


def test_streams_and_calls_interleave(llm):
    """Each call runs the others' steps too; stop strings still end them in time."""
    stop = completion(llm, PROMPT, SEEDED).text[9:12]
    params = SamplingParams(**vars(SEEDED) | {"stop": stop})
    expected = [completion(llm, p, params) for p in (PROMPT, "Other")]
    first, second = llm.stream(PROMPT, params), llm.stream("Other", params)
    next(first), next(second)
    assert generate(llm, ["a", "b"])[1].outputs[0] == completion(llm, "b")
    assert [list(s)[-1].outputs[0] for s in (first, second)] == expected


def test_abandoned_stream_frees_its_pages(llm):
    available = llm.engine.pool.available
    stream = llm.stream("x" * 150, GREEDY)
    next(stream)
    assert llm.engine.pool.available < available
    stream.close()
    assert llm.engine.pool.available == available and not llm.engine.has_work and not llm._live


def test_failed_call_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        generate(llm, [PROMPT, [VOCAB_SIZE]])
    assert not llm.engine.has_work and not llm._live


def test_chat(llm):
    messages = [{"role": "user", "content": "Hi"}]
    (one,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert one.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert 257 in one.prompt_token_ids
    two = llm.chat([messages, [{"role": "user", "content": "Bye"}]], GREEDY, use_tqdm=False)
    assert two[0].outputs == one.outputs and len(two) == 2


def test_module_functions(folder, llm):
    model = str(folder)
    (one,) = jaxdet.generate("Hi", model=model, max_tokens=4, temperature=0)
    assert (
        one.outputs[0].token_ids
        == llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0].outputs[0].token_ids[:4]
    )
    raw = jaxdet.generate([[72, 105], {"prompt": "Hi"}], model=model, max_tokens=4, temperature=0)
    assert [o.prompt_token_ids for o in raw] == [[72, 105]] * 2
    (scored,) = jaxdet.score([[72, 105]], model=model)
    assert scored.logprobs == llm.score([[72, 105]])[0].logprobs


BAD_PROMPTS = [
    ([], "prompts is empty"),
    ("", "prompt is empty"),
    ([""], "prompt is empty"),
    ([[]], "prompt is empty"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ([[1, -1]], "holds -1, outside the vocabulary"),
    ([[VOCAB_SIZE]], "outside the vocabulary"),
    ([[2**40]], "outside the vocabulary"),
    ([[1.5]], "flat list of integers"),
    ([["a"]], "flat list of integers"),
    ([[True]], "flat list of integers"),
    ([[[1]]], "flat list of integers"),
    ([[1] * 300], "300 tokens but max_model_len is 300"),
    ("x" * 300, "max_model_len"),
    ({"text": "x"}, "prompt_token_ids"),
    ({"prompt": 5}, "prompt_token_ids"),
    (5, "must be a prompt or a list"),
    (None, "must be a prompt or a list"),
    ([None], "flat list of integers"),
    ([PROMPT, 5], "prompt=5 must be"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompts(llm, prompts, message):
    with pytest.raises(ValueError, match=message) as caught:
        generate(llm, prompts)
    assert "\n" not in str(caught.value) and not llm.engine.has_work


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate("a", [GREEDY] * 2), "sampling_params has 2 entries for 1 prompts"),
        (lambda llm: llm.generate("a", {"n": 1}), "sampling_params="),
        (lambda llm: llm.generate("a", SamplingParams(logit_bias={VOCAB_SIZE: 1})), "logit_bias holds"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[VOCAB_SIZE])), "stop_token_ids holds"),
        (lambda llm: llm.chat([]), "messages"),
        (lambda llm: llm.chat("Hi"), "messages"),
        (lambda llm: llm.chat([{"content": 5, "role": None}, 7]), "messages"),
        (lambda llm: llm.score([]), "token_id_sequences is empty"),
        (lambda llm: llm.score([[1] * 301]), "301 tokens"),
        (lambda llm: llm.score([[]]), "prompt is empty"),
        (lambda llm: next(llm.stream("")), "prompt is empty"),
        (lambda llm: jaxdet.generate([]), "prompts is empty"),
        (lambda llm: jaxdet.generate("a", temperature=-1), "temperature"),
    ],
)
def test_bad_calls(llm, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(llm)
    assert "\n" not in str(caught.value) and not llm.engine.has_work


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "int3"),
        ("backend", "cuda"),
        ("max_num_seqs", 0),
        ("max_num_seqs", "8"),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 1),
        ("max_model_len", 4097),
        ("max_model_len", 99.5),
        ("num_pages", 3),
        ("num_pages", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", None),
        ("num_speculative_tokens", 0),
        ("num_scheduler_steps", 0),
        ("gpu_memory_utilization", 0),
        ("gpu_memory_utilization", 1.1),
        ("tensor_parallel_size", 2),
    ],
)
def test_bad_settings(folder, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        LLM(folder, **{"max_model_len": 300} | {name: value})
    assert "\n" not in str(caught.value)


def test_no_such_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model"):
        LLM(tmp_path / "none")
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM(tmp_path)


def test_text_never_shows_half_a_character_or_a_stop_strings_start(llm):
    text = "a€b STOX STOP c"
    stream = TextStream(llm.tokenizer, SamplingParams(stop=["STOP", "OX!"]))
    ids, shown = llm.tokenizer.encode(text), []
    for n in range(1, len(ids) + 1):
        stream.extend(ids[:n])
        shown.append(stream.text)
    assert shown[:6] == ["a", "a", "a", "a€", "a€b", "a€b "]
    assert shown[6:11] == ["a€b ", "a€b ", "a€b ", "a€b ST", "a€b STOX "]
    assert set(shown[11:]) == {"a€b STOX "} and stream.stopped_by == "STOP"


def test_requests_in_the_background(llm):
    """Submitted among others, moved on by `step`, one aborted, one ended by a stop string."""
    stop = completion(llm, PROMPT, SEEDED).text[9:12]
    params = [SEEDED, SamplingParams(**vars(SEEDED) | {"stop": stop}), GREEDY]
    expected = [completion(llm, PROMPT, each) for each in params]
    requests = [llm.submit(PROMPT, each) for each in params]
    lost = llm.submit("x" * 100, GREEDY, priority=-1)
    told = llm.step()
    llm.abort(lost)
    while not all(request.finished for request in requests):
        told += llm.step()
    assert lost.output().outputs[0].finish_reason == "abort" and set(requests) <= set(told)
    assert [request.output().outputs[0] for request in requests] == expected
    for request in requests:
        llm.abort(request)
    assert not llm._live and not llm.engine.has_work


def test_an_exception_in_one_consumer(llm):
    """Whoever reads one stream fails; the other stream and its text go on."""
    expected = completion(llm, "Other", SEEDED)
    other = llm.stream("Other", SEEDED)
    next(other)

    def fail():
        for part in llm.stream(PROMPT, GREEDY):
            if len(part.outputs[0].token_ids) == 3:
                raise RuntimeError("the consumer's own fault")

    with pytest.raises(RuntimeError, match="own fault"):
        fail()
    assert list(other)[-1].outputs[0] == expected
    assert not llm._live and not llm.engine.has_work


def test_interrupted_call(llm, monkeypatch):
    """Ctrl-C in a step ends that call; the next one works."""
    expected = completion(llm, PROMPT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine.scheduler, "schedule", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate(llm, [PROMPT, "Other"])
    assert not llm._live and not llm.engine.has_work and completion(llm, PROMPT) == expected


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_guesses_change_nothing(folder, llm, drafter):
    prompts = [PROMPT, "abcabcabcabcabc", "x" * 120]
    params = SamplingParams(**vars(SEEDED) | {"logprobs": 2})
    expected = llm.generate(prompts, params, use_tqdm=False)
    guessing = LLM(
        folder,
        max_model_len=300,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        speculative_model="ngram" if drafter == "ngram" else folder,
        num_speculative_tokens=1,
    )
    found = guessing.generate(prompts, params, use_tqdm=False)
    assert [o.outputs for o in found] == [o.outputs for o in expected]
    stats = guessing.stats()
    assert stats.drafted_tokens and stats.accepted_tokens
    assert stats.accepted_tokens == stats.drafted_tokens or drafter == "ngram"


def test_stats_of_calls(llm):
    before = llm.stats()
    generate(llm, [PROMPT, PROMPT], max_tokens=5)
    after = llm.stats()
    assert after.output_tokens - before.output_tokens == 10
    assert after.finished - before.finished == 2 and after.waiting == after.running == 0
    assert after.prompt_tokens - before.prompt_tokens == 2 * len(llm.tokenizer.encode(PROMPT))
