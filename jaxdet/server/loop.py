"""The one thread that runs the engine; asyncio hands it jobs and gets their results back."""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from jaxdet.api.errors import ApiError
from jaxdet.llm import LLM, Request
from jaxdet.outputs import RequestOutput, ScoreOutput
from jaxdet.server.metrics import Metrics

log = logging.getLogger("jaxdet.server")

MOST_FAILURES = 3
"""Steps that may fail in a row before the requests in them are given up."""


class Update(NamedTuple):
    """What one prompt of a job has got; `place` says which."""

    place: int
    output: RequestOutput | ScoreOutput
    last: bool


@dataclasses.dataclass(eq=False)
class Job:
    """The prompts of one HTTP request.

    What a stream gets is not queued for a client that lags: it stays in the prompts' own requests, and the next look
    finds all of it at once.

    Args:
        submit: hands one prompt each to the engine, in its thread.
        size: sequences it runs.
        stream: tell of every step, not of the end alone.
    """

    submit: Sequence[Callable[[LLM], Request]]
    size: int
    stream: bool = False
    score: bool = False
    began: float = dataclasses.field(default_factory=time.perf_counter)
    accepted: "asyncio.Future[None]" = dataclasses.field(init=False)
    timer: asyncio.TimerHandle = dataclasses.field(init=False)
    arrived: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    mail: "list[Update | Exception]" = dataclasses.field(default_factory=list)
    hungry: bool = False
    """Whether its stream waits for the next step: then it is told of it at once."""
    behind: dict[Request, int] = dataclasses.field(default_factory=dict)
    """Requests that have got what the stream doesn't know of yet, with their places."""
    closed: bool = False


class _Live(NamedTuple):
    job: Job
    place: int


class EngineLoop:
    """Runs an LLM for many clients. Its methods are for one asyncio loop, except those that say otherwise.

    Args:
        llm: nobody else may use it from now on.
        max_waiting: sequences that may wait beside those that run; more are turned away.
        timeout: seconds that a job may take; then its updates end with an error.
    """

    def __init__(self, llm: LLM, metrics: Metrics, *, max_waiting: int, timeout: float):
        self._llm, self._metrics, self._timeout = llm, metrics, timeout
        self.capacity = llm.engine.scheduler.max_num_seqs + max_waiting
        self.open_sequences = 0
        self.healthy = True
        self._jobs: set[Job] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[Request, _Live] = {}
        self._seen: dict[Request, float] = {}
        """When each request last got a token."""
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step it is in; what still runs gets no answer."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def open(self, job: Job) -> None:
        """Queues a job; `close` must follow, whatever happens after.

        Raises:
            ApiError: too much waits already, or would ever fit.
            ValueError: the engine refuses a prompt.
        """
        if job.size > self.capacity:
            raise ApiError(
                400,
                f"the request asks for {job.size} sequences and at most {self.capacity} fit; ask for fewer",
            )
        if self.open_sequences + job.size > self.capacity:
            raise ApiError(
                429,
                f"{self.open_sequences} of {self.capacity} sequences are taken; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.open_sequences += job.size
        self._jobs.add(job)
        late = f"the answer took more than {self._timeout:g} s; ask for fewer tokens or try again later"
        job.timer = self._asyncio.call_later(self._timeout, _deliver, [(job, ApiError(503, late))])
        job.accepted = self._asyncio.create_future()
        self._inbox.put(lambda: self._admit(job))
        try:
            await job.accepted
        except BaseException:
            self.close(job)
            raise

    def close(self, job: Job) -> None:
        """Ends whatever of the job still runs and frees its pages; may be called twice."""
        if not job.closed:
            job.closed = True
            job.timer.cancel()
            self.open_sequences -= job.size
            self._jobs.remove(job)
            self._inbox.put(lambda: self._cancel(job))

    def cut_off(self) -> None:
        """Ends all open jobs with an error: the server stops."""
        stopping = ApiError(503, "the server is stopping; try again", headers={"Retry-After": "1"})
        _deliver([(job, stopping) for job in self._jobs])

    async def updates(self, job: Job) -> AsyncIterator[list[Update]]:
        """Everything that the job's prompts get, until all of them have ended.

        Raises:
            Exception: what one of its prompts failed with.
        """
        left = len(job.submit)
        while left:
            if not job.mail:
                job.arrived.clear()
                job.hungry = True
                # Looked at after `hungry` was set, as the engine looks at `hungry` after it has set this.
                if job.behind:
                    self._inbox.put(lambda: self._tell(_deliver, self._news_of(job)))
                await job.arrived.wait()
            found, job.mail = job.mail, []
            updates: list[Update] = []
            for update in found:
                if isinstance(update, Exception):
                    raise update
                updates.append(update)
                left -= update.last
            yield updates

    async def call[T](self, function: Callable[[LLM], T]) -> T:
        """What a function says of the LLM between two steps."""
        answer: asyncio.Future[T] = self._asyncio.create_future()

        def run() -> None:
            try:
                self._tell(_resolve, answer, function(self._llm))
            except Exception as error:
                self._tell(_refuse, answer, error)

        self._inbox.put(run)
        return await answer

    # From here on everything runs in the engine's thread.

    def _run(self) -> None:
        while True:
            try:
                act = self._inbox.get(block=not self._llm.engine.has_work)
            except queue.Empty:
                self._step()
                continue
            if act is None:
                return
            act()

    def _admit(self, job: Job) -> None:
        if job.closed:
            return
        for place, submit in enumerate(job.submit):
            try:
                self._live[submit(self._llm)] = _Live(job, place)
            except Exception as error:
                self._cancel(job)
                self._tell(_refuse, job.accepted, error)
                return
        self._tell(_resolve, job.accepted, None)

    def _cancel(self, job: Job) -> None:
        job.behind = {}
        for request in [request for request, live in self._live.items() if live.job is job]:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._llm.abort(request)
        self._live.pop(request, None)
        self._seen.pop(request, None)

    def _step(self) -> None:
        try:
            changed = self._llm.step()
            self._failures, self.healthy = 0, True
        except Exception:
            # The engine starts everybody over, to the same bits. What it had found out before it failed isn't said.
            log.exception("a step failed")
            self._failures += 1
            changed = list(self._live)
            if self._failures == MOST_FAILURES:
                self._failures, self.healthy = 0, False
                for request in changed:
                    if not request.finished:
                        self._give_up(request, RuntimeError("the engine failed"))
        now = time.perf_counter()
        news: list[tuple[Job, Update]] = []
        hungry: dict[Job, None] = {}
        for request in changed:
            if (live := self._live.get(request)) is not None:
                job, place = live
                if not job.score:
                    self._observe(request, job, now)
                if job.stream:
                    job.behind[request] = place
                    if job.hungry:
                        hungry[job] = None
                elif request.finished:
                    self._report(request, live, news)
        for job in hungry:
            news += self._news_of(job)
        if news:
            self._tell(_deliver, news)

    def _news_of(self, job: Job) -> list[tuple[Job, Update]]:
        """All that a stream doesn't know yet, if it waits for it."""
        news: list[tuple[Job, Update]] = []
        if job.hungry and job.behind:
            job.hungry = False
            behind, job.behind = job.behind, {}
            for request, place in behind.items():
                self._report(request, _Live(job, place), news)
        return news

    def _report(self, request: Request, live: _Live, news: list[tuple[Job, Update]]) -> None:
        job, place = live
        try:
            if any(s.finish_reason == "error" for s in request.sequences):
                raise RuntimeError("the model's logits are not finite")
            done = request.finished
            output = request.score() if job.score else request.news() if job.stream else request.output()
            news.append((job, Update(place, output, done)))
        except Exception as error:
            self._give_up(request, error)
            return
        if done:
            self._forget(request)

    def _observe(self, request: Request, job: Job, now: float) -> None:
        if (before := self._seen.get(request)) is None:
            self._metrics.first_token.observe(now - job.began)
        else:
            self._metrics.inter_token.observe(now - before)
        self._seen[request] = now
        if request.finished:
            self._metrics.duration.observe(now - job.began)

    def _give_up(self, request: Request, error: Exception) -> None:
        job = self._live[request].job
        self._forget(request)
        self._tell(_deliver, [(job, error)])

    def _tell(self, function: Callable[..., object], *arguments: object) -> None:
        try:
            self._asyncio.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("the event loop is closed")


def _resolve[T](future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _deliver(news: Sequence[tuple[Job, Update | Exception]]) -> None:
    for job, update in news:
        job.mail.append(update)
        job.arrived.set()
