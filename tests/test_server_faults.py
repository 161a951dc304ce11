"""What malformed requests, timeouts and signals do to a server: nothing to anybody else."""

import json
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from serving import KEY, Process, serving

from jaxdet.llm import LLM
from jaxdet.server.app import fingerprint
from jaxdet.testing import write_tiny_model

COMPLETION = {"model": "tiny", "prompt": "The sea is", "max_tokens": 8, "temperature": 0.7, "logprobs": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm, max_body_bytes=100_000) as server:
        yield server


def answer(server) -> tuple:
    """One request's answer to the bit."""
    (choice,) = server.client.completions.create(**COMPLETION).choices
    return choice.text, choice.logprobs.token_logprobs


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


MALFORMED = {
    "empty": b"",
    "no JSON": b"{",
    "bad UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "not an object": b"[1, 2]",
    "deep": b'{"model": "tiny", "prompt": ' + deep(20_000).encode() + b"}",
    "deep metadata": b'{"model": "tiny", "prompt": "x", "metadata": {"a": ' + deep(900).encode() + b"}}",
    "lone surrogate": rb'{"model": "tiny", "prompt": "\ud800"}',
    "lone surrogate as model": rb'{"model": "\ud800", "prompt": "x"}',
    "lone surrogate as key": rb'{"model": "tiny", "prompt": "x", "\ud800": 1}',
    "NaN": b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    "temperature beyond float32": b'{"model": "tiny", "prompt": "x", "temperature": 1e300}',
    "infinite bias": b'{"model": "tiny", "prompt": "x", "logit_bias": {"1": 1e999}}',
    "huge number": b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "big seed": b'{"model": "tiny", "prompt": "x", "seed": 1' + b"0" * 40 + b"}",
    "negative tokens": b'{"model": "tiny", "prompt": [-1]}',
    "unknown tokens": b'{"model": "tiny", "prompt": [259]}',
    "tokens beyond int32": b'{"model": "tiny", "prompt": [99999999999999999999]}',
    "empty prompt": b'{"model": "tiny", "prompt": ""}',
    "empty list": b'{"model": "tiny", "prompt": []}',
    "empty tokens": b'{"model": "tiny", "prompt": [[]]}',
    "null prompt": b'{"model": "tiny", "prompt": null}',
    "many samples": b'{"model": "tiny", "prompt": "x", "n": 1000000000}',
    "no samples": b'{"model": "tiny", "prompt": "x", "n": 0}',
    "long prompt": b'{"model": "tiny", "prompt": "' + b"x" * 90_000 + b'"}',
    "no tokens": b'{"model": "tiny", "prompt": "x", "max_tokens": 0}',
    "bias of no token": b'{"model": "tiny", "prompt": "x", "logit_bias": {"x": 1}}',
    "bias of a negative token": b'{"model": "tiny", "prompt": "x", "logit_bias": {"-1": 1}}',
    "bias of another script's digit": '{"model": "tiny", "prompt": "x", "logit_bias": {"²": 1}}'.encode(),
    "unknown stop token": b'{"model": "tiny", "prompt": "x", "stop_token_ids": [259]}',
    "empty stop": b'{"model": "tiny", "prompt": "x", "stop": [""]}',
    "many stops": json.dumps(COMPLETION | {"stop": ["x"] * 99}).encode(),
    "unknown field": json.dumps(COMPLETION | {"best_of": 3}).encode(),
    "options of no stream": json.dumps(COMPLETION | {"stream_options": {}}).encode(),
    "no schema": json.dumps(COMPLETION | {"response_format": {"type": "json_schema"}}).encode(),
    "wrong schema": json.dumps(
        COMPLETION
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "?"}}}}
    ).encode(),
    "a schema with no end": json.dumps(
        COMPLETION
        | {
            "ignore_eos": True,
            "response_format": {"type": "json_object"},
        }
    ).encode(),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/score", "/v1/chat/completions", "/tokenize"])
def test_malformed_bodies(server, name, path):
    reply = server.http.post(path, content=MALFORMED[name], headers={"Content-Type": "application/json"})
    error = reply.json().get("error", {})
    if path == "/tokenize" and reply.status_code == 200:  # what it asks of a body is less
        return
    assert 400 <= reply.status_code < 500, reply.text
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no JSON", "Expecting property name enclosed in double quotes at character 2"),
        ("bad UTF-8", "no UTF-8"),
        ("deep", "nested too deeply"),
        ("huge number", "thousands of digits"),
    ],
)
def test_what_is_no_json_is_told_so(server, name, says):
    reply = server.http.post(
        "/v1/completions", content=MALFORMED[name], headers={"Content-Type": "application/json"}
    )
    error = reply.json()["error"]
    assert reply.status_code == 400 and says in error["message"] and error["param"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"tool_choice": "required"},
        {"temperature": -1},
        {"max_tokens": -5},
    ],
    ids=str,
)
def test_malformed_chats(server, change):
    reply = server.http.post("/v1/chat/completions", json=CHAT | change)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for x in range(10**9) %}{% endfor %}", "{{ messages }}"])
def test_a_message_is_no_template(server, text):
    found = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()
    assert text in server.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_bodies_must_be_called_json(server, kind):
    body = json.dumps(COMPLETION).encode()
    reply = server.http.post("/v1/completions", content=body, headers={"Content-Type": kind} if kind else {})
    assert reply.status_code == 415 and "'application/json'" in reply.json()["error"]["message"]
    for right in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        reply = server.http.post("/v1/completions", content=body, headers={"Content-Type": right})
        assert reply.status_code == 200


def test_answers_can_be_sent_back(server):
    """As clients do it: with every field that their own objects have, most of them null."""
    ask = server.client.chat.completions.create
    message = ask(**CHAT).choices[0].message
    for history in (message, message.model_dump(), message.model_dump() | {"annotations": []}):
        found = ask(**(CHAT | {"messages": [*CHAT["messages"], history, *CHAT["messages"]]}))
        assert found.choices[0].message.content


def test_wrong_paths_and_methods(server):
    assert server.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.http.get("/v1/completions").status_code == 405
    assert server.http.get("/../../etc/passwd").status_code == 404


def test_malformed_requests_change_nothing(server):
    before = answer(server)
    stop = threading.Event()

    def attack() -> None:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        with httpx.Client(base_url=server.url, headers=headers) as http:
            while not stop.is_set():
                for body in MALFORMED.values():
                    http.post("/v1/completions", content=body)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        assert all(answer(server) == before for _ in range(5))
    finally:
        stop.set()
        attacker.join()
    server.wait_until_idle()


def test_nothing_of_a_prompt_is_logged(server, caplog, capfd):
    caplog.set_level(0)
    server.client.completions.create(**(COMPLETION | {"prompt": "a secret of mine"}))
    server.http.post("/v1/completions", json={"model": "tiny", "prompt": ["another secret", 3]})
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


@pytest.fixture
def other(folder):
    """A server of its own, with other settings."""

    def start(**settings):
        llm = LLM(folder, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=2048)
        return serving(llm, **settings)

    return start


def test_settings(other, caplog):
    """A time limit, a page that may use the server, prompts in the log: on one server, which takes a while to start."""
    caplog.set_level("INFO", "jaxdet.server")
    slow = COMPLETION | {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    with other(timeout=1, allow_origins=["http://example.com"], log_prompts=True, api_keys=()) as server:
        with pytest.raises(openai.InternalServerError, match="more than 1 s") as caught:
            server.client.completions.create(**slow)
        assert caught.value.status_code == 503
        with pytest.raises(openai.APIError, match="more than 1 s"):
            list(server.client.completions.create(**slow, stream=True))
        server.wait_until_idle()
        reply = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://example.com"})
        assert reply.headers["access-control-allow-origin"] == "http://example.com"
    assert "The sea is" in caplog.text


def test_what_outlasts_the_drain_is_told_so(folder, tmp_path):
    """An error in OpenAI's form, and no exception in the log; --max-num-seqs leaves one of the two waiting."""
    options = (
        "--served-model-name",
        "tiny",
        "--max-model-len",
        "2048",
        "--max-num-seqs",
        "1",
        "--drain",
        "0",
    )
    long = COMPLETION | {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    with Process(folder, tmp_path / "log", *options) as process:
        stream = iter(process.client.completions.create(**long, stream=True))
        next(stream)
        told: list[openai.InternalServerError] = []

        def wait() -> None:
            with pytest.raises(openai.InternalServerError) as caught:
                process.client.completions.create(**long)
            told.append(caught.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while process.metric("jaxdet_sequences_open") < 2:
            time.sleep(0.01)
        process.terminate()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        waiting.join()
        assert told[0].status_code == 503 and "the server is stopping" in told[0].message
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_signals_that_go_on_are_not_the_exit_status(folder, tmp_path):
    """Some supervisors repeat SIGTERM; the last ones find Python taking its modules apart."""
    with Process(folder, tmp_path / "log", "--max-model-len", "256", "--drain", "0") as process:
        sent = 0
        while process.running:
            process.terminate()
            sent += 1
            time.sleep(0.005)
        assert sent > 10 and process.wait() == 0


def test_restart_and_drain(folder, llm, server, tmp_path):
    """Another process gives the same bits, and a running answer whole although it was told to stop."""
    expected = answer(server)
    options = ("--served-model-name", "tiny", "--max-model-len", "256", "--max-num-seqs", "4")
    with Process(folder, tmp_path / "log", *options) as process:
        assert answer(process) == expected
        long = COMPLETION | {"max_tokens": 240, "extra_body": {"ignore_eos": True}}
        stream = iter(process.client.completions.create(**long, stream=True))
        chunks = [next(stream)]
        process.terminate()
        chunks += stream
        assert chunks[-1].choices[0].finish_reason == "length"
        assert {chunk.system_fingerprint for chunk in chunks} == {fingerprint(llm)}
        with pytest.raises(openai.APIConnectionError):
            answer(process)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == server.client.completions.create(**long).choices[0].text
