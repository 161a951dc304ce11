"""The scheduler and the page pool by themselves: no model, many random histories."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.scheduler import PATIENCE, Part, Plan, Scheduler
from jaxdet.engine.sequence import Sequence
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE

MAX_LEN = 3 * PAGE_SIZE


def sequence(prompt, max_tokens, *, order=0) -> Sequence:
    return Sequence(
        request_id="",
        prompt=prompt,
        params=SamplingParams(),
        order=order,
        sample_index=0,
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset(),
    )


def scheduler(
    num_pages=8, *, salt="", caching=True, seqs=4, tokens=64, mixed=4, chunked=True, early=True
) -> Scheduler:
    return Scheduler(
        PagePool(num_pages, salt, caching),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_prefill_seqs=2,
        max_mixed_rows=mixed,
        chunked=chunked,
        early=early,
    )


def next_token(tokens) -> int:
    """A stand-in for the model: a function of the tokens before it."""
    return hash(tuple(tokens)) % 7


def known(sequence: Sequence, count: int) -> list[int]:
    """The sequence's first tokens, those in flight included."""
    tokens = list(sequence.tokens)
    while len(tokens) < count:
        tokens.append(next_token(tokens))
    return tokens[:count]


class Machine:
    """Runs a scheduler as the engine does and keeps what each page holds, to check every read.

    Args:
        ahead: whether a step is planned before the results of the one before it are in.
    """

    def __init__(self, scheduler: Scheduler, num_pages: int, *, ahead: bool = False):
        self.scheduler, self.num_pages, self.ahead = scheduler, num_pages, ahead
        self.held: dict[int, list[int]] = {}
        """Page → the prefix that ends in it, as far as written."""
        self.flights: list[Plan] = []

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.flights)

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan or self.flights or not self.scheduler.has_work, "no progress"
        s = self.scheduler
        assert len(s.running) <= s.max_num_seqs and len(plan.rows) <= s.max_num_seqs
        assert sum(part.count for part in plan.chunks) <= s.max_num_batched_tokens
        assert len(plan.chunks) <= s.max_prefill_seqs
        assert not plan.chunks or sum(part.count for part in plan.rows) <= s.max_mixed_rows
        copied = [(target, self.held[source]) for source, target in plan.copies]
        self.held |= dict(copied)
        for part in plan:
            self._compute(part)
        self._check_pages()
        if plan:
            self.flights.append(plan)
        if self.flights and (not plan or len(self.flights) > self.ahead):
            self._collect(self.flights.pop(0))

    def _compute(self, part: Part) -> None:
        sequence, end = part.sequence, part.start + part.count
        assert TRASH_PAGE not in sequence.pages and len(sequence.pages) * PAGE_SIZE >= end
        for at in range(0, part.start, PAGE_SIZE):
            before = known(sequence, min(at + PAGE_SIZE, part.start))
            assert self.held[sequence.pages[at // PAGE_SIZE]][: len(before)] == before
        for page in range(part.start // PAGE_SIZE, -(-end // PAGE_SIZE)):
            self.held[sequence.pages[page]] = known(sequence, min(end, (page + 1) * PAGE_SIZE))

    def _collect(self, plan: Plan) -> None:
        for part in plan:
            sequence = part.sequence
            if part.samples:
                sequence.in_flight -= 1
                if sequence.finish_reason is None:
                    sequence.append(next_token(sequence.tokens))
                    self.scheduler.register(sequence)
                    if sequence.finish_reason:
                        self.scheduler.finish(sequence)

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
        slots = [s.slot for s in self.scheduler.running] + self.scheduler._slots
        assert sorted(slots) == list(range(self.scheduler.max_num_seqs))
        assert all(owner.slot >= 0 for owner in self.scheduler._promised.values())


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
            mixed=data.draw(st.integers(1, 4), label="mixed"),
            tokens=data.draw(st.sampled_from([1, 32, 200]), label="tokens") if chunked else MAX_LEN,
            chunked=chunked,
            early=data.draw(st.booleans(), label="early"),
        ),
        num_pages,
        ahead=data.draw(st.booleans(), label="ahead"),
    )
    everyone = []
    for length in data.draw(st.lists(st.integers(1, MAX_LEN - 1), min_size=1, max_size=8), label="lengths"):
        prompt = [0] * (length // 2) + [1] * (length - length // 2)
        order = data.draw(st.sampled_from([0, 0, -3, 2]), label="priority") + len(everyone)
        everyone.append(sequence(prompt, min(MAX_LEN - length, data.draw(st.integers(1, 140))), order=order))
        machine.scheduler.add(everyone[-1])
        for _ in range(data.draw(st.integers(0, 30))):
            machine.step()
        if data.draw(st.integers(0, 5)) == 0 and everyone[0].finish_reason is None:
            everyone[0].finish_reason = "abort"
            machine.scheduler.finish(everyone[0])
    for _ in range(20000):
        if not machine.has_work:
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
    assert s.running == [first] and s.waiting == [large, small]


def test_youngest_is_preempted_and_comes_back_first():
    s = scheduler(num_pages=4)
    machine = Machine(s, 4)
    old, young, later = (sequence([i] * 120, 30, order=i) for i in (1, 2, 3))
    for each in (old, young, later):
        s.add(each)
    while not s.preemptions:
        machine.step()
    assert s.running == [old, young] and s.waiting == [later]
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
    prefix = s.pool.prefix([1] * 300)
    pages, tail = s.pool.match(prefix)
    assert len(pages) == 2 and tail is not None
    s.pool.release([*pages, tail])
    for _ in range(2):  # the half-full page, then the second of the prefix
        s.pool.allocate()
    assert s.pool.match(prefix) == (pages[:1], None)


def test_poisoned_pages_are_forgotten():
    s = scheduler(num_pages=4, seqs=1, tokens=512)
    bad = sequence([1] * 300, 4)
    s.add(bad)
    s.schedule()
    assert s.pool.known(s.pool.prefix([1] * 300).pages[0])
    bad.finish_reason = "error"
    s.finish(bad)
    assert s.pool.match(s.pool.prefix([1] * 300)) == ([], None) and s.pool.available == 3


@pytest.mark.parametrize("length", [1, PAGE_SIZE, PAGE_SIZE + 1])
def test_a_hit_leaves_a_token_to_compute(length):
    s = scheduler(num_pages=8, seqs=1, tokens=512)
    machine = Machine(s, 8)
    for _ in range(2):
        last = sequence([1] * length, 1)
        s.add(last)
        while s.has_work:
            machine.step()
    assert last.cached == length - 1


def test_the_same_prompts_wait_for_one_of_them():
    """Of many prompts alike one is computed; the others share its full pages and copy its last one."""
    s = scheduler(num_pages=16, seqs=4, tokens=512)
    machine = Machine(s, 16)
    alike = [sequence([1] * 200, 5, order=i) for i in range(4)]
    for each in alike:
        s.add(each)
    machine.step()
    assert s.running == alike[:1]
    plan = s.schedule()
    assert len(s.running) == 4 and [part.count for part in plan] == [1] * 4
    assert len(plan.copies) == 3 and len({each.pages[0] for each in alike}) == 1
    assert len({each.pages[1] for each in alike}) == 4


def test_a_prompt_is_shared_late_where_a_nan_reaches_back():
    """Nobody gets pages whose prompt has not sampled a token: it may turn out to hold a NaN, or be aborted before."""
    for early, cached in ((True, 128), (False, 0)):
        s = scheduler(num_pages=16, seqs=4, tokens=150, early=early)
        first, second = sequence([1] * 300, 5), sequence([1] * 128 + [2] * 100, 5, order=1)
        s.add(first)
        s.schedule()
        first.finish_reason = "abort"
        s.finish(first)
        s.add(second)
        s.schedule()
        assert second.cached == cached
    s = scheduler(num_pages=16, seqs=4, tokens=150, early=False)
    machine = Machine(s, 16)
    first, second = sequence([1] * 300, 5), sequence([1] * 128 + [2] * 100, 5, order=1)
    s.add(first)
    s.add(second)
    machine.step()
    assert s.running == [first] and not first.num_output
    machine.step()
    machine.step()
    assert first.num_output and second.cached == 128


@pytest.mark.parametrize(("length", "num_pages"), [(100, 2), (200, 3), (129, 3), (250, 3)])
def test_a_prompt_comes_again_where_the_pool_holds_one_sequence(length, num_pages):
    """Its copy of the last page needs a page, and the one to copy may be the only one left."""
    s = scheduler(num_pages=num_pages, seqs=2, tokens=512)
    machine = Machine(s, num_pages)
    for _ in range(3):
        s.add(each := sequence([1] * length, 3))
        for _ in range(20):
            machine.step()
        assert each.finish_reason == "length"


def test_decoding_goes_on_beside_a_prompt():
    s = scheduler(num_pages=16, seqs=4, tokens=64)
    machine = Machine(s, 16)
    first, second = sequence([1, 2], 30), sequence([3] * 300, 5, order=1)
    s.add(first)
    machine.step()
    s.add(second)
    for _ in range(3):
        machine.step()
    assert first.num_output == 4 and second.computed == 192


def test_prompts_and_many_rows_take_turns():
    """Beside three sequences that decode a long prompt gets every other step; its rest, less than a step, waits."""
    s = scheduler(num_pages=16, seqs=4, tokens=64, mixed=2)
    decoding = [sequence([i], 30, order=i) for i in range(3)]
    for each in decoding:
        s.add(each)
    machine = Machine(s, 16)
    for _ in range(PATIENCE):
        machine.step()
    late, begun, turns = sequence([3] * 300, 5, order=9), [each.num_output for each in decoding], []
    s.add(late)
    while late.computed < 300:
        before = late.computed
        machine.step()
        turns.append(late.computed > before)
    assert turns == [True, False] * 3 + [True] + [False] * PATIENCE + [True]
    assert [each.num_output - n for each, n in zip(decoding, begun, strict=True)] == [3 + PATIENCE] * 3


def test_guesses_count_as_rows():
    """Two sequences with three guesses each are eight rows: too many beside a prompt that one each may share."""
    s = scheduler(num_pages=16, seqs=4, tokens=64, mixed=4)
    machine = Machine(s, 16)
    decoding = [sequence([i], 30, order=i) for i in range(2)]
    for each in decoding:
        s.add(each)
    machine.step()
    s.add(sequence([3] * 300, 5, order=9))
    plan = s.schedule({each: [1, 2, 3] for each in decoding})
    assert not plan.rows and [part.count for part in plan.chunks] == [64]
    plan = s.schedule({each: [1, 2, 3] for each in decoding})
    assert [part.count for part in plan.rows] == [4, 4] and not plan.chunks
    plan = s.schedule({})
    assert not plan.chunks or sum(part.count for part in plan.rows) <= 4


def test_priority_overtakes_only_so_much():
    s = scheduler(num_pages=16, seqs=1)
    orders = [0, 5, 2, 7]
    for order in orders:
        s.add(sequence([order], 1, order=order))
    assert [each.order for each in s.waiting] == sorted(orders)
