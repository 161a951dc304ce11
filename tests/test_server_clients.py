"""Clients that stop reading, or vanish without a word: their requests end, and nobody else notices."""

import contextlib
import ctypes
import json
import socket
import sys
import time
from collections.abc import Iterator

import pytest
from serving import KEY, serving

from jaxdet.llm import LLM
from jaxdet.server import http
from jaxdet.testing import write_tiny_model

LIMIT = 2
"""Seconds that a client may take nothing."""
SAMPLES = 3
COMPLETION = {"model": "tiny", "prompt": "The sea is", "max_tokens": 8, "seed": 3, "logprobs": 2}
LONG = {"model": "tiny", "prompt": "x" * 30, "max_tokens": 2000, "n": SAMPLES, "ignore_eos": True}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's timeouts are Linux'")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    llm = LLM(folder, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=2048)
    right = llm.engine.step_fn.run

    def slowly(*arguments):
        time.sleep(0.01)  # so that the long requests last longer than the test
        return right(*arguments)

    llm.engine.step_fn.run = slowly
    return llm


def ask(server, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """Sends a request and reads nothing."""
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    host, port = server.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    connection.sendall(head.encode() + payload)
    while not server.metric("jaxdet_kv_pages_in_use"):
        time.sleep(0.01)
    return connection


def hear_nothing(connection: socket.socket) -> None:
    """From now on the connection drops what comes in before it is acknowledged, as a machine without power does."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    drop = b"\x06\x00\x00\x00\x00\x00\x00\x00"  # BPF: return 0, no byte passes
    connection.setsockopt(socket.SOL_SOCKET, 26, bytes(Program(1, drop)))  # SO_ATTACH_FILTER


def answer(server) -> tuple:
    (choice,) = server.client.completions.create(**COMPLETION).choices
    return choice.text, choice.logprobs.token_logprobs, str(choice.logprobs.top_logprobs)


@contextlib.contextmanager
def cancelled(server, expected: tuple, *, after: float) -> Iterator[contextlib.ExitStack]:
    """Waits until the request that the block made is cancelled, not too early; meanwhile others get their bits.

    The block leaves its connection on the stack.
    """
    before, began = server.metric("jaxdet_sequences_cancelled_total"), time.monotonic()
    with contextlib.ExitStack() as stack:
        yield stack
        while server.metric("jaxdet_sequences_cancelled_total") - before < SAMPLES:
            assert time.monotonic() - began < 100, "the request was not cancelled, or ended by itself"
            assert answer(server) == expected
        assert time.monotonic() - began > after
        assert answer(server) == expected
        server.wait_until_idle()


@pytest.fixture
def server(llm):
    with serving(llm, stall_timeout=LIMIT) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_clients_without_power(server, stream):
    """Nothing comes from them, not even an end: only unacknowledged data or probes tell."""
    with cancelled(server, answer(server), after=LIMIT * 0.4) as stack:
        connection = stack.enter_context(ask(server, LONG | {"stream": stream}))
        hear_nothing(connection)


def test_clients_that_stop_reading(server):
    with cancelled(server, answer(server), after=LIMIT * 0.9) as stack:
        stack.enter_context(ask(server, LONG | {"stream": True}, receive_buffer=1))


def test_clients_that_stop_reading_where_the_kernel_does_not_care(llm, monkeypatch, caplog):
    def small_buffer(listener, _) -> None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    monkeypatch.setattr(http, "lose_patience", small_buffer)
    with (
        serving(llm, stall_timeout=LIMIT) as server,
        cancelled(server, answer(server), after=LIMIT * 0.9) as stack,
    ):
        stack.enter_context(ask(server, LONG | {"stream": True}, receive_buffer=1))
    assert "its client took nothing for 2 s" in caplog.text


def test_clients_that_are_only_slow_are_kept(server):
    """Control: whoever takes something now and then gets everything, however long it lasts."""
    before = server.metric("jaxdet_sequences_cancelled_total")
    with ask(server, LONG | {"stream": True, "logprobs": 5}, receive_buffer=2**16) as connection:
        for _ in range(5):
            while len(connection.recv(2**20, socket.MSG_PEEK)) < 2**15:  # until it is full
                time.sleep(0.01)
            time.sleep(LIMIT / 2)
            connection.recv(2**20)
        assert server.metric("jaxdet_sequences_cancelled_total") == before
        assert server.metric("jaxdet_kv_pages_in_use")
    server.wait_until_idle()
