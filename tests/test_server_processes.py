"""The engine's process and HTTP's: one that lags costs the other nothing, and none outlives another."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest
from serving import KEY, Process

from jaxdet.api.errors import ApiError
from jaxdet.api.reader import Grammar
from jaxdet.grammar import JsonGrammars
from jaxdet.llm import LLM
from jaxdet.request import Request
from jaxdet.sampling_params import SamplingParams
from jaxdet.server import host
from jaxdet.server.app import Model, Settings
from jaxdet.server.client import EngineClient, Job
from jaxdet.server.host import EngineHost
from jaxdet.server.http import Serve
from jaxdet.server.listeners import bind, url_of
from jaxdet.server.messages import Ask, Close, Grown, Open, Opened, Refused, Told, pack, receive
from jaxdet.server.metrics import Metrics
from jaxdet.server.run import host_of, http_processes
from jaxdet.testing import byte_tokenizer, write_tiny_model

LONG = {"model": "tiny", "prompt": "The sea is", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4, max_model_len=1024)


class Peer:
    """The other end of a host's connection."""

    def __init__(self, host_on: Callable[[socket.socket], EngineHost]):
        here, self._there = socket.socketpair()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little room as there can be
        self._thread = threading.Thread(target=host_on(here).run)
        self._thread.start()

    def send(self, message) -> None:
        self._there.sendall(pack(message))

    def receive(self):
        return receive(self._there)

    def close(self) -> None:
        self._there.close()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def peer(llm):
    peer = Peer(lambda connection: host_of(llm, [connection], Settings()))
    yield peer
    peer.close()


def test_the_engine_does_not_wait_for_a_reader_that_lags(llm, peer):
    """It runs to the end; what had no room is told later, in few words, and every token of it."""
    params = SamplingParams(max_tokens=900, ignore_eos=True, seed=1, n=3, logprobs=2)
    prompt = llm.tokenizer.encode("The sea is")
    steps = llm.stats().steps
    peer.send(Open(0, [prompt], params))
    while llm.stats().steps < steps + 900:
        time.sleep(0.05)
    assert peer.receive() == Opened(0)
    tokens, logprobs, words = {n: [] for n in range(3)}, {n: [] for n in range(3)}, 0
    reasons = {}
    while len(reasons) < 3:
        message = peer.receive()
        assert isinstance(message, Grown)
        words += 1
        for number, new, growth in message.sequences:
            tokens[number] += new
            assert growth is not None
            logprobs[number] += growth[3]
            if growth[0]:
                reasons[number] = growth[0]
    assert words < 300 and set(reasons.values()) == {"length"}
    peer.close()
    (expected,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    for completion in expected.outputs:
        assert tokens[completion.index] == completion.token_ids
        found = [entry[0] for entry in logprobs[completion.index]]
        assert found == [e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True)]


def test_what_is_closed_is_forgotten(llm, peer):
    """Whatever arrives for it later is about nobody, and the connection's end ends the rest."""
    params = SamplingParams(max_tokens=900, ignore_eos=True)
    for first in (0, 1):
        peer.send(Open(first, [[5, 6, 7]], params))
    peer.send(Close([0, 77], "abort"))
    opened = set()
    while len(opened) < 2:
        if isinstance(message := peer.receive(), Opened):
            opened.add(message.first)
    seen = [n for _ in range(5) if isinstance(m := peer.receive(), Grown) for n, _, _ in m.sequences]
    assert seen and set(seen) == {1}
    peer.close()
    assert not llm.engine.has_work and llm.stats().pages_in_use == 0


def test_tokens_after_a_stop_string_are_dropped(llm):
    """Several come at once where tokens were guessed, or where the engine ran on before it heard of the end."""
    params = SamplingParams(max_tokens=40, seed=3, ignore_eos=True, logprobs=1)
    (whole,) = llm.generate(["The sea is"], params, use_tqdm=False)
    stopping = SamplingParams(**vars(params) | {"stop": whole.outputs[0].text[9:12]})
    (expected,) = llm.generate(["The sea is"], stopping, use_tqdm=False)
    ended = expected.outputs[0]
    assert ended.finish_reason == "stop" and len(ended.token_ids) < 40
    running = llm.submit("The sea is", params)
    while not running.finished:
        llm.step()
    (sequence,) = running.sequences
    sequence.finish_reason = None
    aborted = []
    request = Request(llm.tokenizer, "The sea is", [sequence], stopping, aborted.append)
    request.update(sequence)
    assert aborted == [sequence]
    assert request.output().outputs == [ended]


def test_a_slow_grammar_holds_nobody_up(llm):
    """It is compiled beside the engine; closed before it is ready, it never runs; refused, it says so."""
    ready = threading.Event()
    grammars = JsonGrammars(llm.tokenizer, llm.engine.vocab_size)

    def start(grammar: Grammar):
        assert ready.wait(60)
        return grammars.start(*grammar)

    peer = Peer(lambda connection: EngineHost(llm.engine, start, [connection], capacity=4))
    params = SamplingParams(max_tokens=200)
    rules = Grammar(grammars.of_schema({"type": "boolean"}), "json_schema")
    peer.send(Open(0, [[5, 6]], params, rules))
    peer.send(Open(1, [[5, 6]], params, rules))
    peer.send(Close([1], "abort"))
    peer.send(Open(2, [[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True)))
    told = [peer.receive()]
    while not (isinstance(told[-1], Grown) and told[-1].sequences[0][2]):
        told.append(peer.receive())
    assert told[0] == Opened(2)
    ready.set()
    peer.send(Open(3, [[5, 6]], params, Grammar("start: nonsense", "tools")))
    peer.send(Ask())
    answers, found = {}, []
    while len(answers) < 2 or not (found and found[-1][2] and found[-1][2][0]):
        message = peer.receive()
        if isinstance(message, Opened | Refused):
            answers[message.first] = message
        elif isinstance(message, Grown):
            found += [growth for growth in message.sequences if growth[0] == 0]
    assert isinstance(answers.pop(3), Refused) and answers == {0: Opened(0)}
    assert llm.tokenizer.decode([t for _, tokens, _ in found for t in tokens]) in ("true", "false")
    peer.close()


def test_a_grammar_that_breaks_its_compiler_is_refused(llm):
    def start(_):
        raise RuntimeError("out of states")

    peer = Peer(lambda connection: EngineHost(llm.engine, start, [connection], capacity=4))
    peer.send(Open(0, [[5, 6]], SamplingParams(), Grammar("start: x", "json_schema")))
    refused = peer.receive()
    assert isinstance(refused, Refused) and str(refused.error) == "RuntimeError: out of states"
    peer.send(Ask())
    assert isinstance(peer.receive(), Told), "it goes on"
    peer.close()


def test_a_host_that_fails_ends_the_connection(llm, peer, monkeypatch):
    monkeypatch.setattr(host, "pack", lambda _: 1 / 0)
    hook = []
    monkeypatch.setattr(threading, "excepthook", hook.append)
    peer.send(Ask())
    assert peer.receive() is None
    peer.close()
    assert hook[0].exc_type is ZeroDivisionError


def test_http_starts_with_a_large_tokenizer_and_in_any_folder(llm, tmp_path, monkeypatch):
    """The first message is longer than a socket's buffer, and a file beside it is nobody's module."""
    (tmp_path / "queue.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_tokens([f"token {number}" for number in range(50_000)])
    model = Model.of(llm)._replace(tokenizer=tokenizer)
    asked = Serve(model, Settings(), 1)
    assert len(pack(asked)) > 2**20
    url = url_of((listeners := bind("127.0.0.1", 0, 1))[0])
    with http_processes(listeners, asked) as ((process,), (connection,)):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        connection.close()
        assert process.wait(60) == 1


def test_jobs_that_are_not_open_yet_can_time_out(llm):
    """The other side says nothing at all; and what fails is told to whoever waits."""

    async def run() -> None:
        here, there = socket.socketpair()
        lost = []
        client = EngineClient(
            here, llm.tokenizer, Metrics(), capacity=4, timeout=0.1, on_lost=lambda: lost.append(True)
        )
        await client.start()
        with pytest.raises(ApiError, match=r"more than 0\.1 s"):
            await client.open(Job([{"prompt_token_ids": [1]}], SamplingParams()))
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(0.01)
        client.cut_off()
        there.sendall(pack(told := Told(llm.stats(), 0)))
        assert await asked == told
        asked = asyncio.create_task(client.ask())
        await asyncio.sleep(0.01)
        there.sendall(pack("nonsense")[:-3])
        there.close()
        with pytest.raises(ApiError, match="the engine has stopped"):
            await asked
        assert lost and not client.state.healthy
        await client.stop()

    asyncio.run(run())


@pytest.mark.parametrize("victim", ["http", "engine"])
def test_no_process_outlives_another(folder, tmp_path, victim):
    options = ("--served-model-name", "tiny", "--max-model-len", "2048", "--http-processes", "2")
    process = Process(folder, tmp_path / "log", *options)
    main = psutil.Process(process.pid)
    http = [child for child in main.children() if "jaxdet.server.http" in child.cmdline()]
    stream = iter(process.client.completions.create(**LONG, stream=True))
    next(stream)
    (asked,) = [
        child for child in http if any(c.status == "ESTABLISHED" for c in child.net_connections("tcp"))
    ]
    os.kill(asked.pid if victim == "http" else main.pid, signal.SIGKILL)
    with pytest.raises((openai.APIError, httpx.HTTPError)):
        list(stream)
    status = process.wait()
    assert status == (1 if victim == "http" else -signal.SIGKILL), process.log.read_text()
    psutil.wait_procs(http, timeout=60)
    assert len(http) == 2 and not any(child.is_running() for child in http)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{process.url}/health", headers={"Authorization": f"Bearer {KEY}"})
    if victim == "engine":
        assert "the engine is gone" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()
