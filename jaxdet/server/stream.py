"""Server-sent events, and what happens when the client goes away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jaxdet.api.responses import Answer, Stream, count_usage
from jaxdet.outputs import RequestOutput
from jaxdet.server.client import EngineClient, Job
from jaxdet.server.errors import api_error

log = logging.getLogger("jaxdet.server")

END = "data: [DONE]\n\n"


class DisconnectedError(Exception):
    """The client is gone; nobody reads the answer."""


class EventStream(Response):
    """The chunks of a job that is open already; closes it, however it ends."""

    def __init__(self, engine: EngineClient, job: Job, answer: Answer, *, usage: bool, patience: float):
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._engine, self._job, self._answer = engine, job, answer
        self._usage, self._patience = usage, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # All that can still come is the client's end. Starlette's own stream has tasks and scopes that cost more
        # than this.
        gone = asyncio.ensure_future(receive())
        gone.add_done_callback(lambda _: self._job.fail(DisconnectedError()))
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for events, more in self._events():
                message = {"type": "http.response.body", "body": events.encode(), "more_body": more}
                await _within(self._patience, send, message)
        except DisconnectedError:
            pass
        except TimeoutError:
            log.warning("a stream was cut off: its client took nothing for %g s", self._patience)
        finally:
            gone.cancel()
            self._engine.close(self._job)

    async def _events(self) -> AsyncIterator[tuple[str, bool]]:
        """What each look at the job finds, in one piece, and whether more follows.

        A client that lags gets fewer and longer ones.
        """
        answer, job = self._answer, self._job
        try:
            prompts: dict[int, RequestOutput] = {}
            tokens, per_prompt, left = 0, job.params.n, len(job.prompts)
            stream = Stream(answer)
            async for updates in self._engine.updates(job):
                events: list[str] = []
                for update in updates:
                    assert isinstance(update.output, RequestOutput)
                    prompts[update.place] = update.output
                    left -= update.last
                    for completion in update.output.outputs:
                        index = update.place * per_prompt + completion.index
                        tokens += len(completion.token_ids)
                        events += stream.events(index, completion)
                if not left:
                    if self._usage:
                        asked = sum(len(p.prompt_token_ids) for p in prompts.values())
                        cached = sum(p.num_cached_tokens for p in prompts.values())
                        events.append(answer.closing(count_usage(asked, cached, tokens)))
                    events.append(END)
                if events:
                    yield "".join(events), bool(left)
        except DisconnectedError:
            raise
        except Exception as error:
            yield f"data: {json.dumps(api_error(error).body)}\n\n{END}", False


async def _within(seconds: float, send: Send, message: Message) -> None:
    """Sends it. Most messages needn't wait; only those that do get a timer, which costs more than sending."""
    sending = cast("Coroutine[Any, Any, None]", send(message))
    task = asyncio.Task(sending, loop=asyncio.get_running_loop(), eager_start=True)
    if not task.done():
        async with asyncio.timeout(seconds):
            await task
    task.result()


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
