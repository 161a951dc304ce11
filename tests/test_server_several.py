"""Several HTTP processes on one port are one server: the same answers, one limit, one count, one end."""

import asyncio
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from serving import KEY, Process, at_once, serving

from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.app import Settings
from jaxdet.server.listeners import bind, default_processes
from jaxdet.server.messages import Full, Grown, Open, pack, receive
from jaxdet.server.run import host_of
from jaxdet.testing import write_tiny_model

MANY = 16
"""Connections: they all go to one of two processes once in 30,000 times."""
COMPLETION = {"model": "tiny", "prompt": "The sea is", "max_tokens": 12, "temperature": 0.8, "logprobs": 2}
LONG = COMPLETION | {"max_tokens": 2000, "extra_body": {"ignore_eos": True}, "stream": True}
ROOM = 8
OPTIONS = ("--served-model-name", "tiny", "--max-model-len", "2048", "--http-processes", "2")
LIMITS = ("--max-num-seqs", "4", "--max-waiting", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4, max_model_len=512)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with Process(folder, tmp_path_factory.mktemp("logs") / "log", *OPTIONS, *LIMITS) as server:
        yield server


def children(server: Process) -> list[psutil.Process]:
    found = psutil.Process(server.pid).children()
    return [child for child in found if "jaxdet.server.http" in child.cmdline()]


def connected(server: Process) -> list[int]:
    """Connections that each process has."""
    found = [child.net_connections("tcp") for child in children(server)]
    return [sum(c.status == psutil.CONN_ESTABLISHED for c in each) for each in found]


def statuses(server: Process, path: str) -> set[int]:
    """What all processes say."""
    key = {"Authorization": f"Bearer {KEY}"}
    return {httpx.get(server.url + path, headers=key).status_code for _ in range(MANY)}


async def streamed(client, seed: int) -> tuple[str, list[float]]:
    text, logprobs = "", []
    async for chunk in await client.completions.create(**COMPLETION, seed=seed, stream=True):
        text += chunk.choices[0].text
        logprobs += chunk.choices[0].logprobs.token_logprobs
    return text, logprobs


def test_answers_and_counts_are_one_servers(server, llm):
    """Every connection's stream has the bits of a server with one process, and the counts are of both."""
    name = 'jaxdet_http_requests_total{path="/v1/completions",status="200"}'
    seeds = range(ROOM)
    with serving(llm) as one:
        expected = at_once(one, [lambda client, seed=seed: streamed(client, seed) for seed in seeds])
    assert len({text for text, _ in expected}) > 1  # control: seeds matter

    async def all_of_them(client):
        found = await asyncio.gather(
            *[streamed(client, seed) for seed in seeds], *[client.models.list() for _ in range(MANY)]
        )
        return found[: len(seeds)], connected(server)

    for _ in range(2):
        ((found, busy),) = at_once(server, [all_of_them])
        assert all(busy) and found == expected and all(len(logprobs) == 12 for _, logprobs in expected)
    assert server.metric(name) == 2 * len(seeds)
    assert server.metric("jaxdet_time_to_first_token_seconds_count") == 2 * len(seeds)
    for _ in range(MANY):
        text = httpx.get(f"{server.url}/metrics").text
        assert f"{name} {2.0 * len(seeds)}" in text
        assert len(re.findall("^jaxdet_kv_pages ", text, re.MULTILINE)) == 1


def test_the_queue_has_one_limit(server):
    """Of twice as many as there is room for, exactly so many are taken, whoever is asked; and all say it is full."""

    async def ask(client):
        try:
            return await client.completions.create(**LONG)
        except openai.RateLimitError as error:
            assert error.response.headers["Retry-After"] == "1"
            assert f"{ROOM} of {ROOM} sequences" in error.message
            return None

    async def look(client):
        streams = [s for s in await asyncio.gather(*[ask(client) for _ in range(2 * ROOM)]) if s]
        busy = connected(server)
        full = statuses(server, "/ready"), statuses(server, "/health")
        for stream in streams:
            await stream.close()
        return len(streams), busy, full

    ((taken, busy, full),) = at_once(server, [look])
    assert taken == ROOM and all(busy), busy
    assert full == ({503}, {200})
    server.wait_until_idle()
    assert statuses(server, "/ready") == {200}


def test_a_process_that_lags_holds_nobody_up(llm):
    """One takes nothing of what it asked for; the other, with the same numbers, gets its own and only that, at once."""
    (here, lagging), (other_here, other) = socket.socketpair(), socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little room as there can be
    host = threading.Thread(target=host_of(llm, [here, other_here], Settings(max_waiting=0)).run)
    host.start()
    long = SamplingParams(max_tokens=400, ignore_eos=True, seed=1, n=3, logprobs=2)
    short = SamplingParams(max_tokens=5, ignore_eos=True, seed=2)

    def tokens_of(peer: socket.socket, sequences: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        while sequences:
            if isinstance(message := receive(peer), Grown):
                for number, tokens, growth in message.sequences:
                    found.setdefault(number, []).extend(tokens)
                    sequences -= bool(growth and growth[0])
        return found

    other.sendall(pack(Open(0, [[8, 9]], short)))
    alone = tokens_of(other, 1)
    lagging.sendall(pack(Open(0, [[5, 6, 7]], long)))
    while llm.stats().running < 3:
        time.sleep(0.01)
    answers = []
    for idle in (False, True):
        while idle and llm.engine.has_work:
            time.sleep(0.01)
        other.sendall(pack(Open(0, [[8, 9]], short)))
        answers.append(tokens_of(other, 1))
        assert llm.engine.has_work != idle
    other.sendall(pack(Open(1, [[8, 9]] * 5, short)))
    assert receive(other) == Full(1, 3)  # those three aren't told yet
    assert answers == [alone, alone] and len(alone[0]) == 5
    told = tokens_of(lagging, 3)
    assert [len(told[number]) for number in range(3)] == [400] * 3
    lagging.close()
    other.close()
    host.join(60)
    assert not host.is_alive() and not llm.engine.has_work


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (4, 1), (7, 1), (8, 2), (16, 4), (128, 4)])
def test_processes_by_default(monkeypatch, cores, processes):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_processes() == processes


def test_a_port_that_is_taken_is_one_line():
    first, *others = bind("127.0.0.1", 0, 3)
    assert len({listener.getsockname() for listener in (first, *others)}) == 1
    port = first.getsockname()[1]
    for count in (1, 2):
        with pytest.raises(OSError, match=rf"^host '127.0.0.1' and port {port} can't .*; choose others$"):
            bind("127.0.0.1", port, count)
    with pytest.raises(ValueError, match=r"^port=65536 must be in \[0, 65535\]"):
        bind("127.0.0.1", 65536, 1)
    for listener in (first, *others):
        listener.close()
    for listener in bind("127.0.0.1", port, 2):  # control: it was only taken
        listener.close()


def test_a_drain_is_everybodys(server):
    """Streams of both end whole after SIGTERM; then nothing is left, not even the folder of counts."""
    asked = LONG | {"max_tokens": 200}

    async def drained(client):
        streams = await asyncio.gather(*[client.completions.create(**asked) for _ in range(ROOM)])
        others = await asyncio.gather(*[client.models.list() for _ in range(MANY)])
        busy = connected(server)
        server.terminate()
        return busy, len(others), [[c.choices[0].finish_reason async for c in s][-1] for s in streams]

    http = children(server)
    (counts,) = {Path(child.environ()["PROMETHEUS_MULTIPROC_DIR"]) for child in http}
    assert counts.is_dir()
    ((busy, _, reasons),) = at_once(server, [drained])
    assert all(busy) and reasons == ["length"] * ROOM
    assert server.wait() == 0
    assert len(http) == 2 and not any(child.is_running() for child in http) and not counts.exists()
    assert "Traceback" not in server.log.read_text()
