"""Server-sent events, and what happens when the client goes away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from jaxdet.api.responses import Answer, Stream, count_usage
from jaxdet.outputs import RequestOutput
from jaxdet.server.client import EngineClient, Job
from jaxdet.server.errors import api_error

log = logging.getLogger("jaxdet.server")


class DisconnectedError(Exception):
    """The client is gone; nobody reads the answer."""


class EventStream(StreamingResponse):
    """The chunks of a job that is open already; closes it, however it ends."""

    def __init__(self, engine: EngineClient, job: Job, answer: Answer, *, usage: bool, patience: float):
        super().__init__(
            _events(engine, job, answer, usage=usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._engine, self._job, self._patience = engine, job, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._patience):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.warning("a stream was cut off: its client took nothing for %g s", self._patience)
        finally:
            self._engine.close(self._job)


async def collect(engine: EngineClient, job: Job, http: Request) -> list[Any]:
    """The last update of every prompt of an open job, which is closed then.

    Raises:
        DisconnectedError: the client went away first.
        ApiError: it took too long.
    """

    async def all_of_them() -> list[Any]:
        found: dict[int, Any] = {}
        async for updates in engine.updates(job):
            found |= {update.place: update.output for update in updates}
        return [found[index] for index in range(len(job.prompts))]

    work, gone = asyncio.ensure_future(all_of_them()), asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise DisconnectedError
    finally:
        work.cancel()
        gone.cancel()
        engine.close(job)


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(engine: EngineClient, job: Job, answer: Answer, *, usage: bool) -> AsyncIterator[bytes]:
    """What each look at the job finds, in one piece: a client that lags gets fewer and longer ones."""
    try:
        prompts: dict[int, RequestOutput] = {}
        tokens, per_prompt = 0, job.params.n
        stream = Stream(answer)
        async for updates in engine.updates(job):
            events: list[str] = []
            for update in updates:
                assert isinstance(update.output, RequestOutput)
                prompts[update.place] = update.output
                for completion in update.output.outputs:
                    index = update.place * per_prompt + completion.index
                    tokens += len(completion.token_ids)
                    events += stream.events(index, completion)
            if events:
                yield "".join(events).encode()
        if usage:
            asked = sum(len(p.prompt_token_ids) for p in prompts.values())
            cached = sum(p.num_cached_tokens for p in prompts.values())
            yield answer.closing(count_usage(asked, cached, tokens)).encode()
    except Exception as error:
        yield f"data: {json.dumps(api_error(error).body)}\n\n".encode()
    yield b"data: [DONE]\n\n"
