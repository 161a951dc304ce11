"""A real server on a free port, and the clients that talk to it."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI, OpenAI

from jaxdet.llm import LLM
from jaxdet.server import run
from jaxdet.server.app import Settings, create_app

KEY = "a-key-of-the-tests"


class Server:
    """uvicorn in a thread, as `jaxdet serve` runs it."""

    def __init__(self, llm: LLM, settings: Settings):
        self.llm = llm
        config = uvicorn.Config(create_app(llm, settings), port=0, log_level="warning")
        self._server = run.Server(config, settings.stall_timeout)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> "Server":
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            self._thread.join(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.split(" ")[0] == name)

    def wait_until_idle(self, seconds: float = 30) -> None:
        """Returns once no sequence is open and no page in use."""
        for _ in range(int(seconds / 0.05)):
            if not self.metric("jaxdet_sequences_open") and not self.metric("jaxdet_kv_pages_in_use"):
                return
            threading.Event().wait(0.05)
        raise AssertionError("sequences or pages are still in use")


@contextlib.contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[Server]:
    with Server(llm, Settings(**({"served_model_name": "tiny", "api_keys": [KEY]} | settings))) as server:
        yield server


def at_once(server: Server, tasks: list) -> list:
    """Runs coroutine functions of an async client at the same time; their results in order."""

    async def run() -> list:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(task(client) for task in tasks))

    return asyncio.run(run())
