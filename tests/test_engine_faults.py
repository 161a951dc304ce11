"""What goes wrong outside or inside a step leaves the engine whole and everybody else's bits as they were."""

import itertools
import sys
import threading

import jax
import numpy as np
import pytest
from engine_runs import (
    REQUESTS,
    Answer,
    Request,
    alone,
    answer,
    differing,
    finish,
    model_of,
    new_engine,
    params,
    run,
    tokens,
)

from jaxdet import LLM
from jaxdet.engine import batch
from jaxdet.engine import engine as engine_module
from jaxdet.engine.engine import Engine
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import write_tiny_model

PROMPT = tokens(60, 200)
ALIKE = Request(PROMPT, params(1, max_tokens=6))


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def alike(model):
    return run(new_engine(model), [ALIKE])[0]


def computed_tokens(engine) -> list[int]:
    """Fills up with the number of tokens that each step computes."""
    counts, schedule = [], engine.scheduler.schedule

    def counting(*args):
        plan = schedule(*args)
        counts.append(sum(part.count for part in plan))
        return plan

    engine.scheduler.schedule = counting
    return counts


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the engine runs, as Ctrl-C may at any of them."""

    def __init__(self, line: int):
        self.left = line

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, arg):
        return self._line if "/jaxdet/engine/" in frame.f_code.co_filename else None

    def _line(self, frame, event, arg):
        self.left -= event == "line"
        if self.left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self._line


def test_interrupt_at_any_line(model):
    """Pages are short, so that admission, preemption and copies are interrupted, too; nobody's bits change."""
    rng, interrupted, threads = np.random.default_rng(0), 0, threading.active_count()
    some = (5, 6, 4, 5)
    expected = [*alone(model, some), *alone(model, [0])]
    for _ in range(60):
        engine = new_engine(model)
        engine.pool._free.popitem(), engine.pool._free.popitem()
        queued = [engine.add(*REQUESTS[i]) for i in some]
        for _ in range(int(rng.integers(0, 16))):
            engine.step()
        with Interrupt(int(rng.integers(0, 500))):
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupted += 1
        queued.append(engine.add(*REQUESTS[0]))
        while engine.has_work:
            engine.step()
        assert differing([[answer(s) for s in group] for group in queued], expected) == 0
        assert not engine.scheduler._promised and len(engine.scheduler._slots) == 8
    assert interrupted > 30
    assert threading.active_count() == threads


def test_interrupt_after_the_end(model, monkeypatch):
    """Between a sequence's last token and its leaving."""
    engine = new_engine(model)
    queued = [engine.add(*REQUESTS[i]) for i in (1, 2)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.scheduler, "finish", lambda sequence: (_ for _ in ()).throw(KeyboardInterrupt))
        while True:
            engine.step()
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], alone(model, (1, 2))) == 0


def test_an_interrupt_in_the_midst_of_an_interrupt(model, monkeypatch):
    """Ctrl-C twice: the second while everybody is made to start over."""
    engine, some = new_engine(model), (5, 6, 4, 5)
    queued = [engine.add(*REQUESTS[i]) for i in some]
    for _ in range(3):
        engine.step()
    calls, start_over = itertools.count(), Sequence.start_over

    def interrupted(sequence):
        start_over(sequence)
        if next(calls) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.scheduler, "schedule", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Sequence, "start_over", interrupted)
        engine.step()
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], alone(model, some)) == 0
    assert len(engine.scheduler._slots) == 8


class Raises:
    """A constraint that allows everything, until its n-th question."""

    def __init__(self, name, left):
        self.name, self.left = name, left

    def copy(self):
        return Raises(self.name, self.left)

    def _asked(self, name):
        self.left -= name == self.name
        if self.left < 0:
            raise RuntimeError("a constraint's own fault")

    def allowed(self, guesses):
        self._asked("allowed")
        return np.full(9, 0xFFFFFFFF, np.uint32)

    def append(self, token):
        self._asked("append")


@pytest.mark.parametrize("drafter", [None, "ngram"])
@pytest.mark.parametrize(("name", "left"), [("allowed", 0), ("allowed", 2), ("append", 0), ("append", 2)])
def test_a_constraint_that_raises_ends_its_own_request(model, name, left, drafter, caplog):
    engine, some = new_engine(model, drafter=drafter), (1, 4)
    queued = [engine.add(*REQUESTS[i]) for i in some]
    (broken,) = engine.add([1, 2, 3], params(0, max_tokens=8), constraint=Raises(name, left))
    finish(engine)
    assert broken.finish_reason == "error" and "its constraint failed" in caplog.text
    assert broken.num_output <= left + 1 and engine.stats().failed == 1
    assert differing([[answer(s) for s in group] for group in queued], alone(model, some)) == 0


@pytest.mark.parametrize("after", [0, 1, 4, 7, 8])
@pytest.mark.parametrize("how", ["abort", "preempt", "error"])
def test_who_waits_for_the_same_prompt(model, alike, how, after):
    """Others wait for the first of them to compute their prompt; it goes before, or while, they share it."""
    engine = new_engine(model)
    queued = [engine.add(*ALIKE)[0] for _ in range(4)]
    for _ in range(after):
        engine.step()
    if how == "abort":
        engine.abort(queued[0])
    elif how == "preempt" and engine.scheduler.running:
        engine.scheduler._preempt(engine.scheduler.running[-1])
    elif how == "error":
        engine.abort(queued[0], "error")
    finish(engine)
    first, *others = queued
    expected = alike[0]
    if first.finish_reason != "length":
        expected = Answer(*(field[: first.num_output] for field in expected[:3]), how)
    assert differing([[answer(first)]], [[expected]]) == 0
    assert differing([[answer(s)] for s in others], [alike] * 3) == 0


def test_samples_share_their_prompt(model):
    """Of n samples one computes the prompt; every other computes its last token and its own output."""
    engine = new_engine(model)
    counts = computed_tokens(engine)
    sequences = engine.add(PROMPT, SamplingParams(n=8, max_tokens=4, seed=1, ignore_eos=True))
    finish(engine)
    assert sum(counts) == 200 + 7 + 8 * 3
    assert [s.cached for s in sequences] == [0] + [199] * 7


@pytest.mark.parametrize("length", [127, 128, 129, 255, 256, 257])
def test_prompts_at_the_edge_of_a_page_again(model, length):
    """From the cache, while the first of them still decodes into the page that is copied, and after it."""
    request = Request(tokens(length, length), params(3, max_tokens=8, ignore_eos=True))
    reference = run(new_engine(model), [request])
    engine = new_engine(model)
    (first,) = engine.add(*request)
    while not first.num_output:
        engine.step()
    (second,) = engine.add(*request)
    finish(engine)
    (third,) = engine.add(*request)
    finish(engine)
    assert second.cached == third.cached == length - 1
    for sequence in (first, second, third):
        assert differing([[answer(sequence)]], reference) == 0


def test_the_copied_page_goes_at_once(model, alike):
    """All other pages are taken, so that what was copied from is evicted in the next step."""
    engine = new_engine(model)
    engine.add(*ALIKE)
    finish(engine)
    taken = [engine.pool.allocate() for _ in range(engine.pool.available - 4)]
    queued = [engine.add(*ALIKE)[0], engine.add(*REQUESTS[7])[0], engine.add(*REQUESTS[8])[0]]
    while engine.has_work:
        engine.step()
    engine.pool.release(taken)
    expected = [alike, *alone(model, (7, 8))]
    assert differing([[answer(s)] for s in queued], expected) == 0


def test_one_sequence_at_a_time(model):
    some = (2, 6, 8)
    engine = new_engine(model, max_num_seqs=1)
    assert differing(run(engine, [REQUESTS[i] for i in some]), alone(model, some)) == 0


def test_too_long_a_request_is_refused_and_the_others_go_on(model):
    engine = new_engine(model)
    queued = [engine.add(*REQUESTS[i]) for i in (1, 4)]
    engine.step()
    with pytest.raises(ValueError, match="prompt has 400 tokens but max_model_len is 384"):
        engine.add(tokens(0, 400), SamplingParams())
    with pytest.raises(ValueError, match="num_pages=3 holds no sequence of max_model_len=384"):
        new_engine(model, num_pages=3)
    finish(engine)
    assert differing([[answer(s) for s in group] for group in queued], alone(model, (1, 4))) == 0


def test_priorities_overtake_and_nobody_starves(model, monkeypatch):
    """A lower number goes first, past at most so many that came before."""
    monkeypatch.setattr(engine_module, "OVERTAKING", 5)
    engine = new_engine(model)
    engine.scheduler.max_num_seqs = 1
    short = params(0, max_tokens=1)
    patient = engine.add([1, 2], short)[0]
    ended = []
    urgent = [engine.add([3, i], short, priority=-1)[0] for i in range(12)]
    while engine.has_work:
        ended += [s for s in engine.step() if s.finish_reason]
    assert ended.index(patient) == 4, "four urgent requests came later and went first, the fifth waited"
    assert [s for s in ended if s is not patient] == urgent


def test_priority_with_preemption(model):
    """The urgent one keeps its pages, the others are preempted and come back."""
    engine = new_engine(model)
    taken = [engine.pool.allocate() for _ in range(engine.pool.available - 4)]
    some = (5, 6, 7)
    queued = [engine.add(*REQUESTS[i])[0] for i in some]
    for _ in range(3):
        engine.step()
    urgent = engine.add(*REQUESTS[8], priority=-1)[0]
    while engine.has_work:
        engine.step()
    engine.pool.release(taken)
    assert engine.stats().preemptions
    assert differing([[answer(s)] for s in [*queued, urgent]], alone(model, (*some, 8))) == 0


def test_no_memory_at_the_start(model, monkeypatch):
    def full(self, num_pages, page_size):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    monkeypatch.setattr(Step, "new_cache", full)
    with pytest.raises(MemoryError, match=r"num_pages=33 does not fit.*gpu_memory_utilization") as caught:
        new_engine(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place, remedy",
    [
        ("jaxdet.llm.build_model", "weights of tiny do not fit in float32; use a smaller model"),
        ("jaxdet.engine.engine.Engine.compile_all", "lower max_num_batched_tokens"),
    ],
)
def test_no_memory_for_weights_or_a_step(place, remedy, tmp_path, monkeypatch):
    def full(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    monkeypatch.setattr(place, full)
    with pytest.raises(MemoryError, match=remedy) as caught:
        LLM(write_tiny_model(tmp_path / "tiny"), compile_at_start=True)
    assert "\n" not in str(caught.value)


def test_stats(model):
    engine = new_engine(model)
    assert engine.stats().tokens_per_second == 0 == engine.stats().cache_hit_rate
    queued = [engine.add(*REQUESTS[i])[0] for i in (3, 4, 4)]
    cancelled = engine.add(*REQUESTS[2])[0]
    engine.step()
    now = engine.stats()
    assert now.running + now.waiting == 4 and now.pages_in_use > 0
    engine.abort(cancelled)
    finish(engine)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_in_use, stats.pages) == (0, 0, 0, 32)
    assert (stats.finished, stats.cancelled, stats.failed) == (3, 1, 0)
    assert stats.prompt_tokens == 40 + 100 + 100 and stats.cached_tokens == 99
    assert stats.output_tokens == sum(s.num_output for s in queued)
    assert stats.cache_hit_rate == 99 / 240 and stats.tokens_per_second > 0
    assert 0 < stats.step_ms_p50 <= stats.step_ms_p95 <= stats.step_ms_p99
    (stopped,) = engine.add(*REQUESTS[2])
    engine.step()
    engine.abort(stopped, "stop")  # as a stop string does
    assert (engine.stats().finished, engine.stats().cancelled) == (4, 1)


def test_more_adjustments_than_a_program_takes(model, monkeypatch):
    """They go one after the other, to the same bits, and nothing else is compiled for them."""
    biased = params(1, max_tokens=4, repetition_penalty=1.3, logit_bias={t: t / 9 - 3 for t in range(3, 40)})
    (expected,) = run(new_engine(model), [Request(PROMPT, biased)])
    monkeypatch.setattr(batch, "ADJUSTMENT_BUCKETS", (8, 16))
    engine, adjust, sizes = new_engine(model), Step.adjust, []

    def noted(step, logits, adjustments):
        sizes.append(len(adjustments.row))
        return adjust(step, logits, adjustments)

    monkeypatch.setattr(Step, "adjust", noted)
    assert differing(run(engine, [Request(PROMPT, biased)]), [expected]) == 0
    assert set(sizes) <= {8, 16} and len(sizes) >= 4 * 3


def test_a_pause_is_not_a_slow_step(model, monkeypatch):
    """A step whose sequences have all ended is left on the device; nobody times the wait for the next request."""
    engine = new_engine(model)
    stop = SamplingParams(temperature=0, max_tokens=9, logit_bias={65: 100.0}, stop_token_ids=[65])
    engine.add([1, 2, 3], stop)
    finish(engine)
    clock = engine_module.time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: clock() + 3600)
    engine.add([4, 5, 6], stop)
    finish(engine)
    assert engine.stats().step_ms_p99 < 1800e3


def test_nothing_compiles_after_the_start(model):
    """Whatever is asked for, with a model that guesses."""
    small = model_of(seed=1)
    engine = Engine(
        model,
        salt="",
        max_model_len=256,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        num_pages=7,
        eos_token_ids=[256],
        drafter=small,
        num_speculative_tokens=1,
    )
    engine.compile_all()
    start = engine.stats()
    assert start.compiled_programs > 50 and start.compiled_after_start == 0
    asked = [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=1, top_k=3, logprobs=20, prompt_logprobs=5),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logprobs=0, max_tokens=30),
        SamplingParams(n=3, min_tokens=3, logit_bias=dict.fromkeys(range(200), 0.1), max_tokens=9),
    ]
    for seed, length in enumerate((1, 30, 33, 127, 128, 200)):
        for each in asked:
            engine.add(tokens(seed, length), each)
    engine.add_score(tokens(8, 256))
    finish(engine)
    stats = engine.stats()
    assert stats.drafted_tokens and stats.cached_tokens and stats.finished == 6 * 6 + 1
    assert stats.compiled_after_start == 0 and stats.compiled_programs == start.compiled_programs


@pytest.mark.parametrize("done", ["nothing", "token", "token and count"])
def test_an_interrupt_inside_a_token_changes_nothing(model, done, monkeypatch):
    """Ctrl-C after its logprobs and before, between or after what else a token changes; the request's last one too."""
    take = Sequence.append

    def run(at):
        calls, interrupts = itertools.count(), []

        def half(sequence, token):
            if next(calls) != at:
                return take(sequence, token)
            if "token" in done:
                sequence.tokens.append(token)
            if "count" in done:
                sequence.counts[token] = sequence.counts.get(token, 0) + 1
            raise KeyboardInterrupt

        monkeypatch.setattr(Sequence, "append", half)
        engine = new_engine(model)
        params = SamplingParams(
            temperature=0, max_tokens=6, logprobs=2, frequency_penalty=-2, ignore_eos=True
        )
        (sequence,) = engine.add([5, 6, 7], params)
        while engine.has_work:
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupts.append(at)
        return answer(sequence), interrupts

    expected, none = run(None)
    assert none == []
    for at in (0, 2, 5):
        found, interrupts = run(at)
        assert interrupts == [at]
        assert differing([[found]], [[expected]]) == 0
