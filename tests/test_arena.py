"""The arena: its batches, what its runs count, where answers part, and the HTTP around them."""

import itertools
import json
import threading

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import serving

from jaxdet.arena.answer import Answer, digest
from jaxdet.arena.app import MAX_BODY_BYTES, create_app
from jaxdet.arena.page import FILES
from jaxdet.arena.run import Arena
from jaxdet.arena.settings import CONTEXT, Settings
from jaxdet.arena.traffic import batches
from jaxdet.arena.tree import divergence_tree
from jaxdet.llm import LLM
from jaxdet.testing import VOCAB_SIZE, byte_tokenizer, write_tiny_model

WIDE = {"hidden_size": 576, "head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3}
"""Wide enough for plain JAX to sum in another order for another batch."""
RUN = Settings(prompt="Hello", completions=4, max_tokens=4, load=4)


@pytest.fixture(scope="module")
def arena(tmp_path_factory) -> Arena:
    return Arena(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **WIDE))


def run(arena: Arena, **changes) -> dict[str, dict]:
    """Per column what the last count and the result say."""
    found: dict[str, dict] = {"plain": {}, "jaxdet": {}}
    for event in arena.run(RUN.model_copy(update=changes)):
        if event["event"] in ("answers", "column"):
            found[event["column"]] |= event
    return found


@pytest.fixture(scope="module")
def greedy(arena) -> dict[str, dict]:
    return run(arena)


@pytest.mark.parametrize(("completions", "load"), itertools.product((1, 2, 7, 16, 64), (1, 2, 3, 16, 64)))
def test_batches(completions, load):
    found = batches(completions, load)
    assert sum(batch.ours for batch in found) == completions
    assert all(1 <= batch.ours <= (batch.size + 1) // 2 and batch.size <= load for batch in found)
    if completions >= 6:
        assert {1, load} <= {batch.size for batch in found}


def test_the_engine_repeats_itself_and_plain_jax_does_not(greedy):
    ours, plain = greedy["jaxdet"], greedy["plain"]
    assert ours["sizes"] == plain["sizes"] == [1, 2, 3, 4]
    assert (ours["outputs"], ours["bits"]) == ([0] * 4, [0] * 4)
    assert (ours["diverges_at"], ours["bits_differ_at"]) == (None, None)
    assert len(ours["tree"]["tokens"]) == 4
    for token in ours["tree"]["tokens"]:
        assert [logit["count"] for logit in token["logits"]] == [4]
    # The control: the same batches, the same count.
    assert len(set(plain["bits"])) > 1 and plain["bits_differ_at"] is not None
    assert any(len(token["logits"]) > 1 for token in plain["tree"]["tokens"])
    assert plain["digest"] != ours["digest"]


def test_the_digest_depends_on_the_request_alone(arena, greedy):
    idle = run(arena, load=1, completions=2)
    assert idle["jaxdet"]["digest"] == greedy["jaxdet"]["digest"]
    assert idle["plain"]["digest"] != greedy["plain"]["digest"]
    assert idle["plain"]["bits"] == [0, 0]  # plain JAX repeats itself too, if nobody else is there
    assert run(arena, max_tokens=3)["jaxdet"]["digest"] != greedy["jaxdet"]["digest"]
    sampled, other = (run(arena, temperature=1.0, seed=seed, completions=2, load=2) for seed in (1, 2))
    assert sampled["jaxdet"]["digest"] != other["jaxdet"]["digest"]
    for found in (sampled, other):
        assert (found["jaxdet"]["outputs"], found["jaxdet"]["bits"]) == ([0, 0], [0, 0])


def test_what_is_stopped_leaves_the_engine(arena):
    events = arena.run(RUN)
    for event in events:
        if event["event"] == "progress" and event["step"] > 1:
            break
    assert arena.llm.stats().running > 0
    events.close()
    stats = arena.llm.stats()
    assert (stats.running, stats.waiting, stats.pages_in_use) == (0, 0, 0)


def answers_of(*rows: tuple[list[int], float]) -> list[Answer]:
    """Answers of given tokens; every logit is 0 but those of 65 and 66, which are near the given value."""
    found = []
    for batch, (tokens, value) in enumerate(rows, 1):
        answer = Answer(batch)
        for token in tokens:
            logits = np.zeros(VOCAB_SIZE, np.float32)
            logits[65], logits[66] = value, np.nextafter(np.float32(value), np.float32(9))
            answer.add(token, logits)
        found.append(answer)
    return found


def test_tree():
    a, b, c = [72, 65, 65], [72, 66, 67], [72, 65, 66]
    tree = divergence_tree(answers_of((a, 0.1), (b, 0.3), (c, 0.1), (a, 0.1)), byte_tokenizer())
    assert tree["text"] == "H" and tree["tokens"][0]["logits"] == [
        {"decimal": "0.0", "hex": "0x0p+0", "count": 4}
    ]
    first, second = tree["branches"]
    assert (first["chosen"], first["count"], first["batches"], first["text"]) == (65, 3, [1, 3, 4], "A")
    assert (second["chosen"], second["count"], second["batches"], second["text"]) == (66, 1, [2], "BC")
    assert [branch["text"] for branch in first["branches"]] == ["A", "B"]
    assert {t["id"]: t["logits"][0]["decimal"] for t in second["candidates"]} == {65: "0.3", 66: "0.30000004"}
    for token in (*first["candidates"], *second["candidates"]):
        (logit,) = token["logits"]
        assert np.float32(float.fromhex(logit["hex"])) == np.float32(logit["decimal"])
    assert first["candidates"][0]["logits"][0]["hex"] == "0x1.99999ap-4"


def test_a_candidate_that_was_not_kept_has_no_logit():
    (answer, other) = answers_of(([65], 1.0), ([0], -1.0))
    tree = divergence_tree([answer, other], byte_tokenizer())
    found = {b["chosen"]: {c["id"]: c["logits"] for c in b["candidates"]} for b in tree["branches"]}
    assert found[0][65] == [] and found[65][65][0]["decimal"] == "1.0" and found[0][0]


def test_digest_sees_a_single_bit():
    one, again, two = answers_of(([65], 1.0), ([65], 1.0), ([65], np.nextafter(np.float32(1), np.float32(2))))
    assert one.digest == again.digest != two.digest
    assert digest([one, again]) == digest([one]) != digest([one, two]) == digest([two, one, two])


@pytest.fixture(scope="module")
def client(arena):
    with TestClient(create_app(arena, host="127.0.0.1"), base_url="http://127.0.0.1:8001") as client:
        yield client


def events(response) -> list[dict]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


def test_page(client, arena):
    for path, (_, kind) in FILES.items():
        found = client.get(path)
        assert (found.status_code, found.headers["content-type"]) == (200, kind)
        assert "default-src 'none'" in found.headers["content-security-policy"]
        assert "http://" not in found.text and "https://" not in found.text, (
            "it loads something from elsewhere"
        )
    assert client.get("/api/model").json() == arena.facts
    script = client.get("/arena.js").text + client.get("/source.js").text
    assert not [
        name for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write") if name in script
    ]


def test_the_server_shows_the_page_without_a_key(tmp_path):
    llm = LLM(write_tiny_model(tmp_path / "tiny"), max_model_len=64, num_pages=4)
    with serving(llm, api_keys=["secret"]) as server, httpx.Client(base_url=server.url) as client:
        for path, (_, kind) in FILES.items():
            found = client.get(path)
            assert (found.status_code, found.headers["content-type"]) == (200, kind)
        assert "v1/completions" in client.get("/source.js").text
        assert client.get("/v1/models").status_code == 401  # the control
        schema = client.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json()
        assert not {*FILES} & {*schema["paths"]}


def test_the_page_has_the_settings_limits(client):
    page = client.get("/").text
    schema = Settings.model_json_schema()["properties"]
    for name, limits in schema.items():
        assert f'id="{name}"' in page and f'<label for="{name}">' in page
        if "maximum" in limits and limits["type"] == "integer":
            assert f'min="{limits["minimum"]}" max="{limits["maximum"]}" value="{limits["default"]}"' in page


def test_run_over_http(client, greedy):
    found = events(client.post("/api/run", json=RUN.model_dump()))
    assert found[0]["event"] == "start" and found[-1] == {"event": "end"}
    results = {event["column"]: event for event in found if event["event"] == "column"}
    assert results.keys() == greedy.keys()
    assert results["jaxdet"]["digest"] == greedy["jaxdet"]["digest"] != results["plain"]["digest"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"prompt": "x" * CONTEXT}, f"at most {CONTEXT - 4} fit"),
        ({"prompt": "\ud800"}, "body: Invalid JSON"),
        ({"completions": 65}, "completions"),
        ({"completions": 0}, "completions"),
        ({"max_tokens": 129}, "max_tokens"),
        ({"load": 65}, "load"),
        ({"temperature": -1}, "temperature"),
        ({"seed": 2**53}, "seed"),
        ({"other": 1}, "other"),
    ],
)
def test_wrong_settings_are_one_line(client, changes, says):
    content = json.dumps(RUN.model_dump() | changes)
    found = client.post("/api/run", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text
    message = found.json()["error"]["message"]
    assert says in message and "\n" not in message


def test_bodies_that_no_page_of_ours_sends(client):
    post = client.post
    assert post("/api/run", content="{}", headers={"content-type": "text/plain"}).status_code == 415
    kind = {"content-type": "application/json"}
    assert post("/api/run", content="[", headers=kind).status_code == 400
    assert post("/api/run", content=b" " * (MAX_BODY_BYTES + 1), headers=kind).status_code == 413
    assert (
        post("/api/run", content=iter([b"{}"]), headers=kind).status_code == 413
    )  # it doesn't say its length


def test_other_names_of_this_machine_are_refused(client, arena):
    assert client.get("/", headers={"host": "rebound.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8001"}).status_code == 200
    with TestClient(create_app(arena, host="0.0.0.0"), base_url="http://somewhere") as everywhere:
        assert everywhere.get("/").status_code == 200


class Blocked:
    """An arena whose run waits, then fails."""

    def __init__(self):
        self.going, self.may_end = threading.Event(), threading.Event()

    def run(self, settings: Settings):
        yield {"event": "start"}
        self.going.set()
        self.may_end.wait(30)
        raise RuntimeError("a secret of the server's")


def test_one_run_at_a_time_and_what_fails_says_so(monkeypatch):
    monkeypatch.setattr("jaxdet.arena.app.WAIT_SECONDS", 0.2)
    arena = Blocked()
    with TestClient(create_app(arena, host="127.0.0.1"), base_url="http://127.0.0.1") as client:
        first = []
        thread = threading.Thread(target=lambda: first.append(client.post("/api/run", json=RUN.model_dump())))
        thread.start()
        assert arena.going.wait(30)
        assert client.post("/api/run", json=RUN.model_dump()).status_code == 409
        arena.may_end.set()
        thread.join()
        last = events(first[0])[-1]
        assert last["event"] == "error" and "secret" not in last["message"]
        assert client.post("/api/run", json=RUN.model_dump()).status_code == 200


def test_a_run_ends_when_the_server_is_told_to():
    ended = []

    class Endless:
        def run(self, settings: Settings):
            try:
                while True:
                    yield {"event": "progress"}
            finally:
                ended.append(True)

    app = create_app(Endless(), host="127.0.0.1")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        told = iter([False] * 3)
        app.state.stopping = lambda: next(told, True)
        found = events(client.post("/api/run", json=RUN.model_dump()))
    assert len(found) == 4 and "stopping" in found[-1]["message"] and ended == [True]
