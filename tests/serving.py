"""A real server on a free port, and the clients that talk to it."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import AsyncOpenAI, OpenAI

from jaxdet.llm import LLM
from jaxdet.server import http
from jaxdet.server.app import Model, Settings, create_app
from jaxdet.server.listeners import bind, url_of
from jaxdet.server.run import host_of

KEY = "a-key-of-the-tests"


class Served:
    """A server that runs, and clients for it."""

    def _connect(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        self.client = OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)

    def _disconnect(self) -> None:
        self.http.close()
        self.client.close()

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


class Server(Served):
    """Both sides of `jaxdet serve`, each in a thread."""

    def __init__(self, llm: LLM, settings: Settings):
        self.llm = llm
        here, there = socket.socketpair()
        app = create_app(Model.of(llm), there, settings, on_lost=lambda: None)
        config = uvicorn.Config(app, log_level="warning")
        self._server = http.Server(config, app, patience=settings.stall_timeout, drain=60)
        self._listeners = bind("127.0.0.1", 0, 1)
        self._url = url_of(self._listeners[0])
        runs = host_of(llm, [here], settings).run, lambda: self._server.run(self._listeners)
        self._threads = [threading.Thread(target=run) for run in runs]

    def __enter__(self) -> "Server":
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            assert self._threads[1].is_alive()
            time.sleep(0.01)
        self._connect(self._url)
        return self

    def __exit__(self, *_: object) -> None:
        self._disconnect()
        self._server.should_exit = True
        for thread in self._threads:
            thread.join()


class Process(Served):
    """`jaxdet serve` as users start it."""

    def __init__(self, folder: Path, log: Path, *options: str):
        self.log = log
        command = [Path(sys.executable).parent / "jaxdet", "serve", folder, "--port", "0", *options]
        environment = os.environ | {"JAXDET_API_KEY": KEY}
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        while not (found := re.search(r"running on (http://[0-9.:]+)", log.read_text())):
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.1)
        self.pid = self._process.pid
        self._connect(found[1])

    def __enter__(self) -> "Process":
        return self

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit status."""
        return self._process.wait(60)

    def __exit__(self, *_: object) -> None:
        self._disconnect()
        self.terminate()
        assert self.wait() == 0, self.log.read_text()


@contextlib.contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[Server]:
    with Server(llm, Settings(**({"served_model_name": "tiny", "api_keys": [KEY]} | settings))) as server:
        yield server


def at_once(server: Served, tasks: list) -> list:
    """Runs coroutine functions of an async client at the same time; their results in order."""

    async def run() -> list:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(task(client) for task in tasks))

    return asyncio.run(run())
