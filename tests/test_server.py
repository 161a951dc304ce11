"""The server through OpenAI's own client: answers, limits, and what happens when things go wrong."""

import contextlib
import json
import socket
import threading
import time

import httpx
import openai
import pytest
from serving import KEY, at_once, serving

from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.app import Settings, fingerprint
from jaxdet.testing import write_tiny_model

PROMPT = "The sea is"
CHAT = [{"role": "user", "content": "Hello"}]
COMPLETION = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.8, "seed": 5}
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)


@pytest.fixture(scope="module")
def server(llm):
    # Before the server: the engine is the server's own from then on.
    expected = llm.generate(
        PROMPT, SamplingParams(max_tokens=12, temperature=0.8, seed=5, n=2, logprobs=2), use_tqdm=False
    )
    with serving(llm, max_tokens=200, max_waiting=64, max_body_bytes=10_000) as server:
        server.expected = expected[0]
        yield server


def test_models(server):
    (model,) = server.client.models.list().data
    assert model.id == "tiny" == server.client.models.retrieve("tiny").id
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")


def test_a_completion_is_the_engines_own(server, llm):
    found = server.client.completions.create(**COMPLETION, n=2, logprobs=2)
    for choice, expected in zip(found.choices, server.expected.outputs, strict=True):
        assert (choice.index, choice.text, choice.finish_reason) == (expected.index, expected.text, "length")
        chosen = [entry[t].logprob for t, entry in zip(expected.token_ids, expected.logprobs, strict=True)]
        assert choice.logprobs.token_logprobs == chosen
        tops = [{e.decoded_token: e.logprob for e in entry.values()} for entry in expected.logprobs]
        assert choice.logprobs.top_logprobs == tops
        assert "".join(choice.logprobs.tokens) == choice.text
    assert found.usage.prompt_tokens == len(PROMPT) and found.usage.completion_tokens == 24
    assert found.system_fingerprint == fingerprint(llm)


def test_cached_tokens_are_counted(server):
    prompt = "x" * 140
    server.client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    again = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= 128


def test_many_prompts(server):
    ids = list(PROMPT.encode())
    several = server.client.completions.create(**(COMPLETION | {"prompt": [ids, [1, 2, 3]], "n": 2}))
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert [c.text for c in several.choices[:2]] == [o.text for o in server.expected.outputs]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_streams_add_up(server, logprobs):
    whole = server.client.completions.create(**COMPLETION, n=2, logprobs=logprobs)
    texts, values, reasons = ["", ""], [[], []], [None, None]
    chunks = list(
        server.client.completions.create(
            **COMPLETION, n=2, logprobs=logprobs, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        if logprobs is not None:
            values[choice.index] += choice.logprobs.token_logprobs
    assert texts == [c.text for c in whole.choices] and reasons == ["length"] * 2
    assert len(chunks) > 8 and chunks[-1].usage == whole.usage
    if logprobs is not None:
        assert values == [c.logprobs.token_logprobs for c in whole.choices]


def test_chat(server):
    asked = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 9, "temperature": 0}
    whole = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    (choice,) = whole.choices
    entries = choice.logprobs.content
    assert len(entries) == 9 and all(len(e.top_logprobs) == 3 for e in entries)
    assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)  # greedy
    chunks = list(server.client.chat.completions.create(**asked, stream=True, logprobs=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    streamed = [e.logprob for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == [e.logprob for e in entries]
    assert chunks[-1].choices[0].finish_reason == "length"
    ids = {chunk.id for chunk in chunks}
    assert len(ids) == 1 and whole.id not in ids and all(i.startswith("chatcmpl-") for i in (whole.id, *ids))


def test_stop_and_logit_bias(server):
    whole = server.client.completions.create(**COMPLETION).choices[0].text
    stop = whole[4:6]
    found = server.client.completions.create(**COMPLETION, stop=[stop]).choices[0]
    assert (found.text, found.finish_reason) == (whole[: whole.index(stop)], "stop")
    biased = server.client.completions.create(**COMPLETION, logit_bias={"65": 100}).choices[0]
    assert biased.text == "A" * 12


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema(server, stream):
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    ask = server.client.chat.completions.create
    found = ask(model="tiny", messages=CHAT, response_format=form, n=3, seed=2, max_tokens=60, stream=stream)
    texts = ["", "", ""]
    if stream:
        for chunk in found:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in found.choices]
    for text in texts:
        value = json.loads(text)
        assert sorted(value) == ["n", "ok"] and 0 <= value["n"] <= 99
    object_ = ask(
        model="tiny", messages=CHAT, response_format={"type": "json_object"}, max_tokens=60, temperature=0
    )
    assert object_.choices[0].message.content.startswith("{")


def test_tools_reach_the_template(server, llm, monkeypatch):
    template = (
        "{{ tools[0].function.name }}:{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 12}'}}
    messages = [*CHAT, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    found = server.client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, tools=[{"type": "function", "function": {"name": "f"}}]
    )
    assert found.usage.prompt_tokens == len("f:12")


def test_scores_are_the_samplers(server):
    answer = server.client.completions.create(**COMPLETION, logprobs=0).choices[0]
    ids = [*PROMPT.encode(), *server.expected.outputs[0].token_ids]
    found = server.http.post("/v1/score", json={"model": "tiny", "input": [ids, PROMPT]}).json()
    assert found["data"][0]["token_logprobs"][len(PROMPT) :] == answer.logprobs.token_logprobs
    assert found["data"][1]["token_logprobs"] == found["data"][0]["token_logprobs"][: len(PROMPT)]
    assert found["data"][0]["token_logprobs"][0] is None


def test_tokens_and_back(server):
    tokens = server.http.post("/tokenize", json={"prompt": "naïve"}).json()["tokens"]
    assert tokens == list("naïve".encode())
    assert server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == "naïve"
    chat = server.http.post("/tokenize", json={"messages": CHAT}).json()
    assert chat["count"] == len(chat["tokens"]) > len("Hello") and chat["max_model_len"] == 256


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_one_answer_under_any_load(server, clients):
    """The same request beside mixed traffic, streaming and not: one text, equal logprobs."""

    async def probe(client, stream):
        found = await client.completions.create(**COMPLETION, logprobs=2, stream=stream)
        if not stream:
            (choice,) = found.choices
            return choice.text, tuple(choice.logprobs.token_logprobs), str(choice.logprobs.top_logprobs)
        text, values, tops = "", [], []
        async for chunk in found:
            text += chunk.choices[0].text
            values += chunk.choices[0].logprobs.token_logprobs
            tops += chunk.choices[0].logprobs.top_logprobs
        return text, tuple(values), str(tops)

    async def other(client, seed):
        found = await client.completions.create(
            model="tiny", prompt="y" * (1 + 7 * seed % 90), max_tokens=1 + seed % 20, seed=seed
        )
        return found.choices[0].text, (), ""

    tasks = []
    for i in range(clients):
        if i % 3 < 2:
            tasks.append(lambda client, i=i: probe(client, bool(i % 2)))
        else:
            tasks.append(lambda client, i=i: other(client, i))
    found = at_once(server, tasks)
    probes = {answer for i, answer in enumerate(found) if i % 3 < 2}
    expected = server.expected.outputs[0]
    assert len(probes) == 1 and probes.pop()[0] == expected.text
    # Control: another seed is another answer, so the comparison can fail.
    other_seed = server.client.completions.create(**(COMPLETION | {"seed": 6})).choices[0].text
    assert other_seed != expected.text


def test_keys(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        reply = httpx.get(f"{server.url}/v1/models", headers=headers)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("max_tokens", -1, "max_tokens=-1 must be above 0"),
        ("max_body_bytes", 0, "max_body_bytes=0 must be above 0"),
        ("timeout", float("nan"), "timeout=nan must be above 0"),
        ("max_waiting", -1, "max_waiting=-1 must be at least 0"),
        ("api_keys", ("a", ""), "an API key is empty"),
    ],
)
def test_settings_that_serve_nobody_or_everybody(name, value, says):
    with pytest.raises(ValueError, match=says):
        Settings(**{name: value})


def test_no_page_may_use_it(server):
    reply = server.http.get("/v1/models", headers={"Origin": "http://example.com"})
    assert "access-control-allow-origin" not in reply.headers


def test_large_bodies(server):
    assert server.http.post("/tokenize", json={"prompt": "x" * 20_000}).status_code == 413
    parts = (b"x" * 1000 for _ in range(20))  # chunked: no length is announced
    reply = server.http.post("/tokenize", content=parts)
    assert reply.status_code == 413 and "10000 bytes" in reply.json()["error"]["message"]


def test_limits_name_themselves(server):
    ask = server.client.completions.create
    with pytest.raises(openai.BadRequestError, match="max_tokens=201 must be at most 200"):
        ask(**(COMPLETION | {"max_tokens": 201}))
    with pytest.raises(openai.BadRequestError, match="max_model_len is 256"):
        ask(**(COMPLETION | {"prompt": "x" * 300, "stream": True}))
    with pytest.raises(openai.BadRequestError, match="asks for 128 sequences and at most 72 fit"):
        ask(**COMPLETION, n=128)
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        ask(**(COMPLETION | {"model": "gpt"}))


def test_a_full_queue_says_when_to_come_back(server):
    slow = {"model": "tiny", "prompt": "x", "max_tokens": 200, "n": 72, "extra_body": {"ignore_eos": True}}
    with server.client.completions.create(**slow, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            server.client.completions.create(**COMPLETION)
        assert caught.value.response.headers["Retry-After"] == "1"
        assert httpx.get(f"{server.url}/ready").status_code == 503
    server.wait_until_idle()
    assert server.client.completions.create(**COMPLETION).choices[0].text == server.expected.outputs[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_pages_of_vanished_clients_are_freed(server, stream):
    before = server.metric("jaxdet_sequences_cancelled_total")
    body = {
        "model": "tiny",
        "prompt": "x" * 30,
        "max_tokens": 200,
        "n": 8,
        "ignore_eos": True,
        "stream": stream,
    }
    payload = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.sendall(head.encode() + payload)
        while not server.metric("jaxdet_kv_pages_in_use"):
            time.sleep(0.01)
    server.wait_until_idle()
    assert server.metric("jaxdet_sequences_cancelled_total") - before == 8


def test_metrics(server):
    text = server.http.get("/metrics").text
    for name in ("time_to_first_token_seconds", "inter_token_seconds", "request_seconds"):
        assert server.metric(f"jaxdet_{name}_count") > 0
    assert server.metric("jaxdet_output_tokens_total") > 0
    assert 'path="/v1/completions",status="200"' in text and PROMPT not in text


@contextlib.contextmanager
def failing(monkeypatch, llm, times: int):
    """The next `times` steps fail."""
    right, left = llm.engine.step_fn.run, [times]

    def run(*arguments):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the device is on fire")
        return right(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.step_fn, "run", run)
        yield


def test_a_failed_step_changes_no_answer(server, llm, monkeypatch, caplog):
    with failing(monkeypatch, llm, 2):
        found = server.client.completions.create(**COMPLETION).choices[0].text
    assert found == server.expected.outputs[0].text and "on fire" in caplog.text


def test_an_engine_that_keeps_failing_says_so(server, llm, monkeypatch):
    with failing(monkeypatch, llm, 3), pytest.raises(openai.InternalServerError) as caught:
        server.client.completions.create(**COMPLETION)
    assert "on fire" not in caught.value.message  # what went wrong inside is nobody's business
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.client.completions.create(**COMPLETION).choices[0].text == server.expected.outputs[0].text
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_one_request_fails_alone(server, monkeypatch):
    """Text that can't be decoded ends its own request; the one beside it doesn't notice."""
    from jaxdet.text import TextStream

    right = TextStream.extend

    def extend(self, tokens, start):
        if self._params.seed == 13:
            raise RuntimeError("no text")
        right(self, tokens, start)

    monkeypatch.setattr(TextStream, "extend", extend)
    failed: list[Exception] = []

    def ask_for_failure() -> None:
        try:
            server.client.completions.create(**(COMPLETION | {"seed": 13, "stop": ["never"]}))
        except openai.InternalServerError as error:
            failed.append(error)

    beside = threading.Thread(target=ask_for_failure)
    beside.start()
    assert server.client.completions.create(**COMPLETION).choices[0].text == server.expected.outputs[0].text
    beside.join()
    assert len(failed) == 1
    server.wait_until_idle()
