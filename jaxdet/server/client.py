"""The HTTP side of the engine: hands it jobs and turns the tokens that come back into text. For one asyncio loop."""

import asyncio
import collections
import dataclasses
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdet.api.errors import ApiError
from jaxdet.api.reader import Grammar
from jaxdet.engine.sequence import Entry
from jaxdet.outputs import RequestOutput, ScoreOutput
from jaxdet.request import Request
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.messages import (
    LENGTH,
    Ask,
    Close,
    Failed,
    Full,
    Grown,
    Growth,
    Open,
    Opened,
    Refused,
    State,
    Told,
    pack,
    unpack,
)
from jaxdet.server.metrics import Metrics
from jaxdet.tokenizer import Tokenizer

log = logging.getLogger("jaxdet.server")


class Update(NamedTuple):
    """What one prompt of a job has got; `place` says which."""

    place: int
    output: RequestOutput | ScoreOutput
    last: bool


@dataclasses.dataclass(eq=False, slots=True)
class _Sequence:
    """A completion as far as the engine has told of it; implements `jaxdet.request.Progress`."""

    number: int
    request_id: str
    prompt: list[int]
    sample_index: int
    tokens: list[int]
    cached: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    logprobs: list[Entry] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[Entry] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)

    def take(self, tokens: list[int], growth: Growth | None) -> None:
        self.tokens += tokens
        if growth is not None:
            self.finish_reason, self.stop_reason = growth.finish_reason, growth.stop_reason
            self.cached, self.scores = growth.cached, growth.scores
            self.logprobs += growth.logprobs


@dataclasses.dataclass(eq=False)
class Job:
    """The prompts of one HTTP request.

    What a stream gets is not queued for a client that lags: it stays in the prompts' sequences, and the next look
    finds all of it at once.

    Args:
        prompts: each {"prompt_token_ids": ids}, with its text as "prompt" if it came as text.
        grammar: what answers must follow.
        stream: tell of every step, not of the end alone.
        score: the prompts' logprobs are wanted and nothing else.
    """

    prompts: Sequence[dict[str, Any]]
    params: SamplingParams
    grammar: Grammar | None = None
    stream: bool = False
    score: bool = False
    began: float = dataclasses.field(default_factory=time.perf_counter)
    requests: list[Request[_Sequence]] = dataclasses.field(default_factory=list)
    """One for each prompt."""
    accepted: "asyncio.Future[None]" = dataclasses.field(init=False)
    timer: asyncio.TimerHandle = dataclasses.field(init=False)
    arrived: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    changed: dict[int, bool] = dataclasses.field(default_factory=dict)
    """Places of the prompts that have got what the job's reader doesn't know of yet, and whether that is all."""
    error: Exception | None = None
    closed: bool = False

    @property
    def size(self) -> int:
        """Sequences that it runs."""
        return len(self.prompts) * self.params.n

    def fail(self, error: Exception) -> None:
        """Ends its updates with an error, or the wait for them."""
        self.error = self.error or error
        self.arrived.set()
        _refuse(self.accepted, error)


class _Live(NamedTuple):
    job: Job
    place: int
    sequence: _Sequence


class EngineClient:
    """An engine in another process, or thread, for many HTTP requests.

    Args:
        connection: a stream socket with an `EngineHost` at its other end.
        tokenizer: the model's.
        capacity: sequences that may run or wait in the engine, whoever asked for them.
        timeout: seconds that a job may take; then its updates end with an error.
        on_lost: called if the engine goes away by itself.
    """

    def __init__(
        self,
        connection: socket.socket,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        capacity: int,
        timeout: float,
        on_lost: Callable[[], None],
    ):
        self._connection, self._tokenizer, self._metrics = connection, tokenizer, metrics
        self._capacity, self._timeout, self._on_lost = capacity, timeout, on_lost
        self._cut_off = False
        self.state = State(healthy=False)
        """Whether the engine is there and works, and whether there is room."""
        self._jobs: dict[Job, None] = {}
        self._live: dict[int, _Live] = {}
        self._next = 0
        self._asked: collections.deque[asyncio.Future[Told]] = collections.deque()
        self._seen: dict[Request[_Sequence], float] = {}
        """When each request last got a token."""

    async def start(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)
        self.state = State()
        self._task = asyncio.create_task(self._listen(reader))

    async def stop(self) -> None:
        """Ends the connection, and with it whatever still runs."""
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, self._writer.wait_closed(), return_exceptions=True)

    async def open(self, job: Job) -> None:
        """Queues a job; `close` must follow, whatever happens after.

        Raises:
            ApiError: too much waits already, or would ever fit, or the server is stopping, or the engine is gone.
            ValueError: the engine refuses a prompt.
        """
        if job.size > self._capacity:
            raise ApiError(
                400,
                f"the request asks for {job.size} sequences and at most {self._capacity} fit; ask for fewer",
            )
        if self._cut_off:
            raise _stopping()
        if self._task.done():
            raise _gone()
        loop = asyncio.get_running_loop()
        first, self._next = self._next, self._next + job.size
        self._jobs[job] = None
        late = f"the answer took more than {self._timeout:g} s; ask for fewer tokens or try again later"
        job.timer = loop.call_later(self._timeout, job.fail, ApiError(503, late))
        job.accepted = loop.create_future()
        numbers = iter(range(first, self._next))
        for place, prompt in enumerate(job.prompts):
            ids = prompt["prompt_token_ids"]
            sequences = [
                _Sequence(number, str(number), ids, index, list(ids))
                for index, number in enumerate(itertools.islice(numbers, job.params.n))
            ]
            text = prompt.get("prompt")
            job.requests.append(Request(self._tokenizer, text, sequences, job.params, self._stop))
            self._live |= {s.number: _Live(job, place, s) for s in sequences}
        prompts = [prompt["prompt_token_ids"] for prompt in job.prompts]
        self._send(Open(first, prompts, job.params, job.grammar, job.score))
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
            del self._jobs[job]
            self._end([s for request in job.requests for s in request.sequences], reason="abort")
            for request in job.requests:
                self._seen.pop(request, None)

    def cut_off(self) -> None:
        """Ends all open jobs with an error, and takes no more: the server stops."""
        self._cut_off = True
        for job in self._jobs:
            job.fail(_stopping())

    async def updates(self, job: Job) -> AsyncIterator[list[Update]]:
        """Everything that the job's prompts get, until all of them have ended.

        Raises:
            Exception: what one of its prompts failed with.
        """
        left = len(job.prompts)
        while left:
            job.arrived.clear()
            if not job.changed and job.error is None:
                await job.arrived.wait()
            if job.error is not None:
                raise job.error
            changed, job.changed = job.changed, {}
            updates: list[Update] = []
            for place, done in changed.items():
                request = job.requests[place]
                if job.score:
                    (sequence,) = request.sequences
                    output = ScoreOutput(sequence.prompt, sequence.scores)
                else:
                    output = request.news() if job.stream else request.output()
                updates.append(Update(place, output, done))
                left -= done
            yield updates

    async def ask(self) -> Told:
        """What the engine has done, between two of its steps.

        Raises:
            ApiError: it is gone.
        """
        if self._task.done():
            raise _gone()
        self._asked.append(answer := asyncio.get_running_loop().create_future())
        self._send(Ask())
        return await answer

    def _send(self, message: Any) -> None:
        if not self._task.done():
            self._writer.write(pack(message))

    def _stop(self, sequence: _Sequence) -> None:
        """A stop string has ended it."""
        self._end([sequence], reason="stop")

    def _end(self, sequences: Iterable[_Sequence], *, reason: str) -> None:
        if numbers := [s.number for s in sequences if self._live.pop(s.number, None)]:
            self._send(Close(numbers, reason))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                self._take(unpack(await reader.readexactly(size)))
        except (asyncio.IncompleteReadError, OSError):
            log.error("the engine is gone")
            self._on_lost()
        except Exception:
            log.exception("what the engine said can't be read")
            self._on_lost()
        finally:
            self.state = State(healthy=False)
            for job in self._jobs:
                job.fail(_gone())
            for answer in self._asked:
                _refuse(answer, _gone())

    def _take(self, message: Grown | Opened | Refused | Full | Failed | Told | State) -> None:
        match message:
            case Grown():
                self._take_tokens(message)
            case Opened():
                if (live := self._live.get(message.first)) is not None:
                    _resolve(live.job.accepted, None)
            case Refused():
                if (live := self._live.get(message.first)) is not None:
                    _refuse(live.job.accepted, message.error)
            case Full():
                if (live := self._live.get(message.first)) is not None:
                    _refuse(live.job.accepted, self._turned_away(message.taken))
            case Failed():
                for number in message.numbers:
                    if (live := self._live.pop(number, None)) is not None:
                        live.job.fail(RuntimeError("the engine failed"))
            case Told():
                _resolve(self._asked.popleft(), message)
            case State():
                self.state = message

    def _turned_away(self, taken: int) -> ApiError:
        return ApiError(
            429,
            f"{taken} of {self._capacity} sequences are taken; try again later",
            code="queue_full",
            headers={"Retry-After": "1"},
        )

    def _take_tokens(self, message: Grown) -> None:
        now = time.perf_counter()
        changed: dict[Request[_Sequence], _Live] = {}
        for number, tokens, growth in message.sequences:
            # This loop runs for every sequence at every step.
            if (live := self._live.get(number)) is None:  # closed in the meantime
                continue
            job, place, sequence = live
            sequence.take(tokens, None if growth is None else Growth(*growth))
            try:
                (request := job.requests[place]).update(sequence)
            except Exception as error:  # the others' tokens must not be lost
                log.exception("a request's text could not be decoded")
                job.fail(error)
                self._end([sequence], reason="abort")
                continue
            if sequence.finish_reason is not None:
                self._live.pop(number, None)
                if sequence.finish_reason == "error":
                    job.fail(RuntimeError("the model's logits are not finite"))
            changed[request] = live
        for request, (job, place, sequence) in changed.items():
            done = sequence.finish_reason is not None and request.finished
            if not job.score:
                self._observe(request, job, now, done=done)
            if job.stream or done:
                job.changed[place] = done
                job.arrived.set()

    def _observe(self, request: Request[_Sequence], job: Job, now: float, *, done: bool) -> None:
        if (before := self._seen.get(request)) is None:
            self._metrics.first_token.observe(now - job.began)
        else:
            self._metrics.inter_token.observe(now - before)
        self._seen[request] = now
        if done:
            self._metrics.duration.observe(now - job.began)


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping; try again", headers={"Retry-After": "1"})


def _gone() -> ApiError:
    return ApiError(503, "the engine has stopped; try again later", headers={"Retry-After": "1"})


def _resolve[T](future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _refuse(future: asyncio.Future, error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
