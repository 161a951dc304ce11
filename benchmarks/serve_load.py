"""Clients of `jaxdet serve` for benchmarks/serve.py, in a process without JAX.

Reads jobs, one JSON object a line, and answers each with a line: what so many clients at a time saw of its requests.
"""

import asyncio
import itertools
import json
import sys
import time
from typing import Any, cast

import uvloop


class _Answer(asyncio.Protocol):
    """Sends a request and notes what arrives, and when. Reading it would take the server's time: that comes later."""

    def __init__(self, request: bytes):
        self._request = request
        self.arrivals = [(time.monotonic(), b"")]
        self.whole = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        self.whole.set_result(exc)


def _request(job: dict[str, Any], seed: int, prompt: list[int]) -> bytes:
    body = {"model": job["model"], "prompt": prompt, "max_tokens": job["output"], "seed": seed}
    payload = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


async def load(job: dict[str, Any]) -> dict[str, Any]:
    """Sends a job's requests, so many at a time, and reads the answers once all have come."""
    left, answers = iter(job["requests"]), {}

    async def ask(request: bytes) -> _Answer:
        loop = asyncio.get_running_loop()
        _, answer = await loop.create_connection(lambda: _Answer(request), "127.0.0.1", job["port"])
        await answer.whole
        return answer

    async def client() -> None:
        for seed, prompt in left:
            answers[seed] = await ask(_request(job, seed, prompt))

    cpu, began = time.process_time(), time.monotonic()
    await asyncio.gather(*(client() for _ in range(job["clients"])))
    found = {"began": began, "ended": time.monotonic(), "cpu": time.process_time() - cpu}
    first, between, texts, events = [], [], {}, 0
    for seed, answer in answers.items():
        times = [when for when, data in answer.arrivals if not data or b"data: " in data]
        first.append(times[1] - times[0])
        between += [later - when for when, later in itertools.pairwise(times[1:])]
        lines = b"".join(data for _, data in answer.arrivals).splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        events += len(chunks)
        texts[seed] = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return found | {"first": first, "between": between, "events": events, "texts": texts}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(uvloop.run(load(json.loads(line)))), flush=True)
