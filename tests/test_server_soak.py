"""An hour's worth of requests in a few minutes, to a real server process: nothing grows, nothing is left."""

import asyncio
import os
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from serving import KEY, Process

from jaxdet.testing import write_tiny_model

CLIENTS = 12
REQUESTS = 400
"""In each round, every one with other prompts, so that the prefix cache turns over."""
ROUNDS = 5
"""Measured ones, after those in which something was still compiled."""
MOST_ROUNDS = 30
IDLE_SECONDS = 11
"""After these anyio's idle threads end when the next request comes."""
OPTIONS = (
    "--served-model-name",
    "tiny",
    "--max-model-len",
    "256",
    "--max-num-seqs",
    "2",
    "--max-waiting",
    "12",
    "--http-processes",
    "2",
)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


class Footprint(NamedTuple):
    rss: int
    """KiB."""
    threads: int
    files: int


def footprint(pid: int) -> Footprint:
    """Of the engine's process and HTTP's two together."""
    found = []
    for each in (pid, *(child.pid for child in psutil.Process(pid).children())):
        status = Path(f"/proc/{each}/status").read_text()
        rss, threads = (
            int(re.search(rf"^{name}:\s+(\d+)", status, re.M)[1]) for name in ("VmRSS", "Threads")
        )
        found.append((rss, threads, len(os.listdir(f"/proc/{each}/fd"))))
    assert len(found) == 3
    return Footprint(*map(sum, zip(*found, strict=True)))


async def one(http: httpx.AsyncClient, rng: random.Random) -> int:
    """A request of some kind; its status, 0 if the client went away first."""
    body = {
        "model": "tiny",
        "prompt": rng.choices(range(32, 127), k=rng.choice([20, 150])),
        "max_tokens": rng.randint(1, 12),
        "seed": rng.randrange(1000),
    }
    kind = rng.randrange(9)
    if kind == 0:
        body |= {"n": 3, "logprobs": 2}
    elif kind == 1:
        body |= {"stop": ["e", "xyz"], "frequency_penalty": 0.5, "stream": True}
    elif kind == 2:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}
    elif kind == 3:
        return (await http.post("/v1/score", json={"model": "tiny", "input": body["prompt"]})).status_code
    elif kind == 4:
        wrong = rng.choice(
            [{"n": 10**6}, {"prompt": [999]}, {"model": "other"}, {"prompt": "x" * 400}, {"x": "y" * 5000}]
        )
        return (await http.post("/v1/completions", json=body | wrong)).status_code
    elif kind == 5:  # gives up while it waits
        try:
            body |= {"max_tokens": 200, "ignore_eos": True}
            return (
                await http.post("/v1/completions", json=body, timeout=rng.uniform(0.005, 0.05))
            ).status_code
        except httpx.TimeoutException:
            return 0
    elif kind == 6:  # goes away in the midst of a stream
        body |= {"max_tokens": 200, "ignore_eos": True, "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_raw():
                return 0
        return reply.status_code
    elif kind == 7:
        return (await http.get(rng.choice(["/health", "/metrics", "/v1/models", "/nothing"]))).status_code
    return (await http.post("/v1/completions", json=body)).status_code


async def load(url: str, seed: int) -> list[int]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as http:
        gate = asyncio.Semaphore(CLIENTS)

        async def gated(number: int) -> int:
            async with gate:
                return await one(http, random.Random(f"{seed}/{number}"))

        return await asyncio.gather(*(gated(number) for number in range(REQUESTS)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    body = {"model": "tiny", "prompt": "The sea is", "max_tokens": 8, "seed": 3, "logprobs": 1}
    with Process(folder, tmp_path / "log", *OPTIONS) as process:

        def answer() -> str:
            close = {"Connection": "close"}  # the next one may go to the other process
            return str(process.http.post("/v1/completions", json=body, headers=close).json()["choices"])

        def settled() -> Footprint:
            process.wait_until_idle()
            time.sleep(IDLE_SECONDS)
            assert {answer() for _ in range(16)} == {before}
            return footprint(process.pid)

        before = answer()
        statuses: list[int] = []
        measured: list[Footprint] = []
        for number in range(MOST_ROUNDS):
            compiled = process.metric("jaxdet_compiled_programs_after_start_total")
            statuses += asyncio.run(load(process.url, number))
            process.wait_until_idle()
            if process.metric("jaxdet_compiled_programs_after_start_total") != compiled:
                measured = []
            elif not measured:
                measured = [settled()]
            else:
                measured.append(footprint(process.pid))
            if len(measured) > ROUNDS:
                break
        else:
            raise AssertionError(f"it went on compiling: {measured}")
        measured.append(settled())
        assert process.metric("jaxdet_sequences_cancelled_total") > 100
        log = process.log.read_text()
    assert {*statuses} == {0, 200, 400, 404, 429} or {*statuses} == {0, 200, 400, 404}
    assert statuses.count(200) > len(statuses) / 3 and statuses.count(0) > len(statuses) / 10
    assert "Traceback" not in log and "ERROR" not in log
    first, last = measured[0], measured[-1]
    assert last.threads <= first.threads and last.files <= first.files, measured
    assert last.rss < first.rss * 1.01, measured
