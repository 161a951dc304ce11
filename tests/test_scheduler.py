"""The scheduler and the page pool by themselves: no model, many random histories."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.scheduler import Scheduler
from jaxdet.engine.sequence import Sequence
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE

MAX_LEN = 3 * PAGE_SIZE


def sequence(prompt, max_tokens, **fields) -> Sequence:
    return Sequence(
        request_id="",
        prompt=prompt,
        params=SamplingParams(**fields),
        sample_index=0,
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
    )


def scheduler(num_pages=8, *, salt="", caching=True, seqs=4, tokens=64, chunked=True) -> Scheduler:
    return Scheduler(
        PagePool(num_pages, salt, caching),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_prefill_seqs=2,
        chunked=chunked,
    )


def next_token(tokens) -> int:
    """A stand-in for the model: a function of the tokens before it."""
    return hash(tuple(tokens)) % 7


class Machine:
    """Runs a scheduler and keeps what each page holds, to check every read."""

    def __init__(self, scheduler: Scheduler, num_pages: int):
        self.scheduler, self.num_pages = scheduler, num_pages
        self.held: dict[int, list[int]] = {}
        """Page → the prefix that ends in it, as far as written."""

    def step(self) -> None:
        work = self.scheduler.schedule()
        assert work or not self.scheduler.has_work, "no progress"
        s = self.scheduler
        assert len(s.running) <= s.max_num_seqs
        assert len(work) <= s.max_num_seqs
        if any(n > 1 for _, n in work):
            assert sum(n for _, n in work) <= s.max_num_batched_tokens and len(work) <= s.max_prefill_seqs
        for sequence, count in work:
            assert TRASH_PAGE not in sequence.pages
            end = sequence.computed + count
            assert len(sequence.pages) * PAGE_SIZE >= end
            for at in range(0, sequence.computed, PAGE_SIZE):
                known = sequence.tokens[: min(at + PAGE_SIZE, sequence.computed)]
                assert self.held[sequence.pages[at // PAGE_SIZE]][: len(known)] == known
            for page in range(sequence.computed // PAGE_SIZE, -(-end // PAGE_SIZE)):
                self.held[sequence.pages[page]] = sequence.tokens[: min(end, (page + 1) * PAGE_SIZE)]
        self._check_pages()
        for sequence, count in work:
            s.computed(sequence, count)
            if sequence.pending == 0:
                sequence.append(next_token(sequence.tokens))
                if sequence.finish_reason:
                    s.finish(sequence)

    def _check_pages(self) -> None:
        """A page being written belongs to one sequence; free, used and trash pages are all there are."""
        pool, users = self.scheduler.pool, np.zeros(self.num_pages, int)
        for running in self.scheduler.running:
            assert len(set(running.pages)) == len(running.pages)
            for page in running.pages:
                users[page] += 1
            for page in running.pages[running.computed // PAGE_SIZE :]:
                others = (r for r in self.scheduler.running if r is not running)
                assert all(page not in r.pages for r in others)
        np.testing.assert_array_equal(users, pool._users)
        assert all(not s.pages for s in self.scheduler.waiting)
        assert {*np.flatnonzero(users), *pool._free, TRASH_PAGE} == set(range(self.num_pages))
        assert len(pool._free) + np.count_nonzero(users) + 1 == self.num_pages


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_random_histories(data):
    """Sequences arrive and are aborted at random; everything ends, with the tokens that the model dictates."""
    num_pages = data.draw(st.integers(4, 12), label="pages")
    chunked = data.draw(st.booleans(), label="chunked")
    machine = Machine(
        scheduler(
            num_pages,
            caching=data.draw(st.booleans(), label="caching"),
            seqs=data.draw(st.integers(1, 5), label="seqs"),
            tokens=data.draw(st.sampled_from([1, 32, 200]), label="tokens") if chunked else MAX_LEN,
            chunked=chunked,
        ),
        num_pages,
    )
    everyone = []
    for length in data.draw(st.lists(st.integers(1, MAX_LEN - 1), min_size=1, max_size=8), label="lengths"):
        prompt = [0] * (length // 2) + [1] * (length - length // 2)
        everyone.append(sequence(prompt, min(MAX_LEN - length, data.draw(st.integers(1, 140)))))
        machine.scheduler.add(everyone[-1])
        for _ in range(data.draw(st.integers(0, 30))):
            machine.step()
        if data.draw(st.integers(0, 5)) == 0 and everyone[0].finish_reason is None:
            everyone[0].finish_reason = "abort"
            machine.scheduler.finish(everyone[0])
    for _ in range(20000):
        if not machine.scheduler.has_work:
            break
        machine.step()
    for s in everyone:
        assert s.finish_reason in ("abort", "length")
        expected = list(s.prompt)
        while len(expected) < len(s.tokens):
            expected.append(next_token(expected))
        assert s.tokens == expected
    assert machine.scheduler.pool.available == num_pages - 1


def test_first_come_first_served():
    """A large head of the queue is not overtaken by small ones behind it."""
    s = scheduler(num_pages=4, seqs=4, tokens=512)
    first, large, small = sequence([1] * 200, 5), sequence([2] * 300, 5), sequence([3], 5)
    for each in (first, large, small):
        s.add(each)
    s.schedule()
    assert s.running == [first] and list(s.waiting) == [large, small]


def test_youngest_is_preempted_and_comes_back_first():
    s = scheduler(num_pages=4)
    machine = Machine(s, 4)
    old, young, later = (sequence([i] * 120, 30) for i in (1, 2, 3))
    for each in (old, young, later):
        s.add(each)
    while not s.preemptions:
        machine.step()
    assert s.running == [old] and list(s.waiting) == [young, later]
    while s.has_work:
        machine.step()
    assert s.preemptions < 20


def test_prefix_hash_depends_on_everything_before_it():
    pool = PagePool(8, "weights", True)
    page = list(range(PAGE_SIZE))
    one = pool.extend_hash(pool.root, page)
    assert one != PagePool(8, "other weights", True).extend_hash(
        PagePool(8, "other weights", True).root, page
    )
    assert one != pool.extend_hash(one, page)
    assert one != pool.extend_hash(pool.root, page[::-1])


def test_least_recently_freed_page_is_evicted_first_and_longest_prefix_last():
    s = scheduler(num_pages=4, seqs=1, tokens=512)
    machine = Machine(s, 4)
    s.add(sequence([1] * 300, 1))
    while s.has_work:
        machine.step()
    pages, hashes = s.pool.match([1] * 300)
    assert len(pages) == 2
    s.pool.release(pages)
    for _ in range(2):  # the half-full page, then the second of the prefix
        s.pool.allocate()
    assert s.pool.match([1] * 300) == (pages[:1], hashes[:1])


def test_poisoned_pages_are_forgotten():
    s = scheduler(num_pages=4, seqs=1, tokens=512)
    bad = sequence([1] * 300, 4)
    s.add(bad)
    s.computed(*s.schedule()[0])
    bad.finish_reason = "error"
    s.finish(bad)
    assert s.pool.match([1] * 300) == ([], []) and s.pool.available == 3


@pytest.mark.parametrize("length", [1, PAGE_SIZE, PAGE_SIZE + 1])
def test_a_hit_leaves_a_token_to_compute(length):
    s = scheduler(num_pages=8, seqs=1, tokens=512)
    machine = Machine(s, 8)
    for _ in range(2):
        last = sequence([1] * length, 1)
        s.add(last)
        while s.has_work:
            machine.step()
    assert last.cached == (length - 1) // PAGE_SIZE * PAGE_SIZE
