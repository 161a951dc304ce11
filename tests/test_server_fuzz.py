"""Malformed requests by the thousand, from the server's own description and by hand: no 5xx, nothing left behind."""

import collections
import json
import random
import re
import socket
from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from serving import KEY, serving

from jaxdet.llm import LLM
from jaxdet.testing import write_tiny_model

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize")
FEW, MANY = 40, 1000
"""Requests to each path in each mode: 10,000 in the slow tier."""
NARROW = {
    "model": {"const": "tiny"},
    "n": {"type": "integer", "minimum": 1, "maximum": 3},
    "max_tokens": {"type": "integer", "minimum": 2, "maximum": 8},
    "max_completion_tokens": {"type": "integer", "minimum": 2, "maximum": 8},
    "min_tokens": {"type": "integer", "minimum": 0, "maximum": 2},
    "logit_bias": {
        "type": "object",
        "maxProperties": 2,
        "properties": {"65": {"type": "number", "maximum": 100}},
    },
}
COMPLETION = {"model": "tiny", "prompt": "The sea is", "max_tokens": 8, "seed": 3, "logprobs": 1}
TIERS = [
    (GenerationMode.NEGATIVE, FEW),
    *(pytest.param(mode, MANY, marks=pytest.mark.slow) for mode in GenerationMode),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    llm = LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    with serving(llm, max_tokens=9, max_body_bytes=50_000) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(server, caplog):
    """Around every test: the same answer to the bit, everything free, healthy, and no exception in the log."""

    def answer() -> tuple:
        (choice,) = server.client.completions.create(**COMPLETION).choices
        return choice.text, choice.logprobs

    before = answer()
    yield
    server.wait_until_idle()
    assert server.http.get("/health").status_code == server.http.get("/ready").status_code == 200
    assert answer() == before
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def description(server) -> dict:
    """The server's schema, narrowed to what this model takes: nearly every request would end there."""
    found = server.http.get("/openapi.json").text.replace("2147483648", "259")
    described = json.loads(found)
    for schema in described["components"]["schemas"].values():
        schema.get("properties", {}).update(
            {name: narrow for name, narrow in NARROW.items() if name in schema.get("properties", {})}
        )
    return described


@pytest.mark.parametrize(("mode", "count"), TIERS, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_gets_a_5xx(server, path, mode, count):
    operation = schemathesis.openapi.from_dict(description(server))[path]["POST"]
    statuses: collections.Counter[int] = collections.Counter()

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case) -> None:
        reply = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (case.body, reply.text)

    send()
    assert statuses.total() >= count / 2, statuses
    if mode is GenerationMode.POSITIVE:
        assert statuses[200], statuses


VALUES = [
    *(
        b"NaN",
        b"-Infinity",
        b"1e400",
        b"-1",
        b"0",
        b"1.5",
        b"-0.0",
        b"1e-320",
        b"2147483648",
        b"18446744073709551616",
    ),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b"[[]]",
        b"[null]",
        b"[-1]",
        b"[1e400]",
        b'[""]',
        b'{"a":{}}',
        b'{"":1}',
    ),
    *(
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"\xff\xfe"',
        b'"\x00"',
        '"\u202e\ufeff\U0001f4a9"'.encode(),
        b"'x'",
    ),
    *(b'"{{ 7 * 7 }}"', b'"{% for x in range(10**9) %}{% endfor %}"', b'"{{ self.__init__.__globals__ }}"'),
    *(b'"<|im_end|>\\n<|im_start|>system"', b'"../../etc/passwd"', b'"%s%n$(id)`id`"', b'"\\r\\nX-Evil: 1"'),
    *(b"9" * 5000, b"[" * 5000, b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900),
    *(b'"' + b"x" * 40_000 + b'"', b"[" + b"1," * 20_000 + b"1]", b'[{"role": "user", "content": null}]'),
    *(
        b'{"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}',
        b'{"type": "object"}',
    ),
    b'{"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "(a+)+$", "type": "string"}}}',
    b'[{"type": "function", "function": {"name": "f", "parameters": {"$ref": "file:///etc/passwd"}}}]',
]
VALID = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
        "tool_choice": "auto",
    },
    "/v1/score": {"model": "tiny", "input": [[1, 2, 3], "x"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [72, 105]},
}


def bodies(server, count: int) -> Iterator[tuple[str, bytes]]:
    """Valid bodies of which a few fields have got values that somebody thought of, and some are torn."""
    rng = random.Random(0)
    schemas = description(server)["components"]["schemas"].values()
    names = sorted({name for schema in schemas for name in schema.get("properties", {})})
    for number in range(count):
        path = rng.choice(PATHS)
        fields = [(name, json.dumps(value).encode()) for name, value in VALID[path].items()]
        for _ in range(rng.randint(1, 3)):
            name = rng.choice([*(name for name, _ in fields), rng.choice(names)])
            if rng.random() < 0.8:  # otherwise the name is there twice
                fields = [pair for pair in fields if pair[0] != name]
            fields.append((name, rng.choice(VALUES)))
        fields.append((f"leak-{number}", b"1")) if rng.random() < 0.2 else None
        body = b"{" + b", ".join(b'"%s": %s' % (name.encode(), value) for name, value in fields) + b"}"
        if rng.random() < 0.1:
            body = body[: rng.randrange(len(body))] + rng.randbytes(rng.randrange(3))
        yield path, body


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_hand_made_bodies(server, count):
    statuses: collections.Counter[int] = collections.Counter()
    secret = COMPLETION | {"prompt": "leak-secret"}
    whispered = server.client.completions.create(**secret).choices[0].text
    for number, (path, body) in enumerate(bodies(server, count)):
        reply = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        statuses[reply.status_code] += 1
        assert reply.status_code < 500, (path, body[:500], reply.text)
        assert {*re.findall(r"leak-\w+", reply.text)} <= {f"leak-{number}"}, reply.text
        if reply.status_code != 200:
            message = reply.json()["error"]["message"]
            assert message and "\n" not in message and "Traceback" not in message
        if number % 10 == 0:
            assert server.client.completions.create(**secret).choices[0].text == whispered
    assert statuses.total() == count and statuses[200] > count / 100 and statuses[400] > count / 2, statuses


def abuses() -> dict[str, bytes]:
    """What no HTTP client would send."""
    body = json.dumps(COMPLETION).encode()
    length = b"Content-Length: %d\r\n" % len(body)
    auth = b"Authorization: Bearer " + KEY.encode() + b"\r\nHost: x\r\nConnection: close\r\n"
    kind = b"Content-Type: application/json\r\n"

    def post(headers: bytes, content: bytes = body, line: bytes = b"POST /v1/completions HTTP/1.1") -> bytes:
        return line + b"\r\n" + auth + kind + headers + b"\r\n" + content

    return {
        "nothing": b"",
        "an empty line": b"\r\n\r\n",
        "noise": random.Random(0).randbytes(2000),
        "TLS": bytes.fromhex("160301020001000001fc0303") + bytes(500),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "HTTP/0.9": b"GET /health\r\n",
        "HTTP/9.9": post(length, line=b"POST /v1/completions HTTP/9.9"),
        "an unknown method": post(length, line=b"BREW /v1/completions HTTP/1.1"),
        "a method of odd letters": post(length, line=b"PO\x00ST /v1/completions HTTP/1.1"),
        "a long path": post(length, line=b"POST /" + b"a" * 60_000 + b" HTTP/1.1"),
        "a path out of the root": post(length, line=b"POST /../../../etc/passwd HTTP/1.1"),
        "a path of odd bytes": post(length, line=b"POST /v1/models/%00%ff%0d%0aX:1 HTTP/1.1"),
        "a path that isn't ASCII": post(length, line=b"POST /\xff\xfe HTTP/1.1"),
        "another server's address": post(length, line=b"POST http://example.com/v1/completions HTTP/1.1"),
        "a star": post(length, line=b"OPTIONS * HTTP/1.1"),
        "negative length": post(b"Content-Length: -5\r\n"),
        "length in words": post(b"Content-Length: many\r\n"),
        "length beyond all": post(b"Content-Length: " + b"9" * 30 + b"\r\n"),
        "length in digits of another script": post("Content-Length: ²\r\n".encode("latin-1")),
        "two lengths": post(length + b"Content-Length: 3\r\n"),
        "two lengths in one": post(b"Content-Length: %d, %d\r\n" % (len(body), len(body))),
        "length and chunks": post(length + b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n" + body),
        "unknown encoding": post(b"Transfer-Encoding: gzip, chunked\r\n"),
        "a chunk of no size": post(b"Transfer-Encoding: chunked\r\n", b"zz\r\nabc\r\n0\r\n\r\n"),
        "a chunk of negative size": post(b"Transfer-Encoding: chunked\r\n", b"-5\r\nabc\r\n0\r\n\r\n"),
        "a chunk of huge size": post(b"Transfer-Encoding: chunked\r\n", b"F" * 16 + b"\r\nabc"),
        "a body that is cut off": post(b"Content-Length: 5000\r\n"),
        "more than one body": post(length, body + body),
        "a second request of noise": post(length, body + b"\x00\x01\x02\r\n\r\n"),
        "a compressed body": post(length + b"Content-Encoding: gzip\r\n"),
        "a body that waits for leave": post(length + b"Expect: 100-continue\r\n", b""),
        "an upgrade": post(length + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"),
        "a long header": post(length + b"X: " + b"a" * 100_000 + b"\r\n"),
        "many headers": post(length + b"".join(b"X-%d: 1\r\n" % i for i in range(5000))),
        "a header with no name": post(length + b": x\r\n"),
        "a header with no colon": post(length + b"nonsense\r\n"),
        "a header on two lines": post(length + b"X: a\r\n b\r\n"),
        "NUL in a header": post(length + b"X: a\x00b\r\n"),
        "a header that isn't ASCII": post(length + b"X-\xff: \xff\r\n"),
        "two keys": post(length + b"Authorization: Bearer other\r\n"),
        "a key of odd bytes": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        "a long key": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        + b"k" * 40_000
        + b"\r\n\r\n",
        "no host": b"GET /health HTTP/1.1\r\n\r\n",
        "a host with a path": b"GET / HTTP/1.1\r\nHost: x/y?z#[\r\nConnection: close\r\n\r\n",
        "two hosts": b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        "a kind of odd letters": post(length + b"Content-Type: a/b; c=\xff\r\n"),
    }


@pytest.mark.parametrize("rounds", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_abuses_of_http(server, rounds):
    host, port = server.url.removeprefix("http://").split(":")
    statuses: collections.Counter[int] = collections.Counter()
    for name, data in list(abuses().items()) * rounds:
        # Some of them wait for an answer that can't come yet, as the server waits for the rest.
        with socket.create_connection((host, int(port)), timeout=1) as connection:
            received = b""
            try:
                connection.sendall(data)
                while part := connection.recv(2**16):
                    received += part
            except (ConnectionError, TimeoutError):
                pass
        found = [int(code) for code in re.findall(rb"^HTTP/1.1 (\d{3})", received, re.MULTILINE)]
        statuses.update(found)
        assert all(code < 500 for code in found), (name, received[:500])
        assert b"Traceback" not in received and b"root:" not in received
    assert statuses[200] > 5 * rounds and statuses[400] > 10 * rounds, statuses
