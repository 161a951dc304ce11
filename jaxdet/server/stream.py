"""Server-sent events, and what happens when the client goes away."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxdet.outputs import RequestOutput
from jaxdet.server.errors import ApiError, api_error
from jaxdet.server.loop import EngineLoop, Job
from jaxdet.server.responses import Answer, count_usage

WRITE_SECONDS = 30
"""How long a finished answer may take to reach a slow client."""


class DisconnectedError(Exception):
    """The client is gone; nobody reads the answer."""


class EventStream(StreamingResponse):
    """The chunks of a job that is open already; closes it, however it ends."""

    def __init__(self, loop: EngineLoop, job: Job, answer: Answer, *, usage: bool, timeout: float):
        events = _events(loop, job, answer, usage=usage, timeout=timeout)
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._loop, self._job, self._limit = loop, job, timeout + WRITE_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit):
                await super().__call__(scope, receive, send)
        finally:
            self._loop.close(self._job)


async def collect(loop: EngineLoop, job: Job, http: Request, timeout: float) -> list[Any]:
    """The last update of every prompt of an open job, which is closed then.

    Raises:
        DisconnectedError: the client went away first.
        ApiError: it took longer than `timeout` seconds.
    """

    async def all_of_them() -> list[Any]:
        found: dict[int, Any] = {}
        async for update in loop.updates(job):
            found[update.place] = update.output
        return [found[index] for index in range(len(job.submit))]

    work, gone = asyncio.ensure_future(all_of_them()), asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise DisconnectedError if gone.done() else _timeout(timeout)
    finally:
        work.cancel()
        gone.cancel()
        loop.close(job)


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    loop: EngineLoop, job: Job, answer: Answer, *, usage: bool, timeout: float
) -> AsyncIterator[str]:
    try:
        async with asyncio.timeout(timeout):
            prompts: dict[int, RequestOutput] = {}
            tokens, per_prompt = 0, job.size // len(job.submit)
            lengths: dict[int, int] = {}
            async for update in loop.updates(job):
                assert isinstance(update.output, RequestOutput)
                prompts[update.place] = update.output
                for completion in update.output.outputs:
                    index = update.place * per_prompt + completion.index
                    if index not in lengths and answer.is_chat:
                        yield _event(answer.opening(index))
                    tokens += len(completion.token_ids)
                    offset = lengths.get(index, 0)
                    lengths[index] = offset + len(completion.text)
                    # A token may be no text yet: half a character, or the beginning of a stop string.
                    if completion.text or completion.logprobs or completion.finish_reason:
                        yield _event(answer.chunk(index, completion, offset))
            if usage:
                asked = sum(len(p.prompt_token_ids) for p in prompts.values())
                cached = sum(p.num_cached_tokens for p in prompts.values())
                yield _event(answer.closing(count_usage(asked, cached, tokens)))
    except TimeoutError:
        yield _event(_timeout(timeout).body)
    except Exception as error:
        yield _event(api_error(error).body)
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"


def _timeout(seconds: float) -> ApiError:
    return ApiError(503, f"the answer took more than {seconds:g} s; ask for fewer tokens or try again later")
