"""Ten thousand requests that schemathesis makes from the server's own description, valid and not."""

import json

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from serving import KEY, serving

from jaxdet.llm import LLM
from jaxdet.testing import write_tiny_model

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/score", "/tokenize", "/detokenize")
EXAMPLES = 1000
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    llm = LLM(folder, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    with serving(llm, max_tokens=9) as server:
        yield server


def description(server) -> dict:
    """The server's schema, narrowed to what this model takes: nearly every request would end there."""
    found = server.http.get("/openapi.json").text.replace("2147483648", "259")
    described = json.loads(found)
    for schema in described["components"]["schemas"].values():
        schema.get("properties", {}).update(
            {name: narrow for name, narrow in NARROW.items() if name in schema.get("properties", {})}
        )
    return described


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_gets_a_5xx(server, path, mode):
    """And none leaves anything behind: pages, sequences, or a trace in the next answer."""
    before = server.client.completions.create(**COMPLETION).choices[0]
    operation = schemathesis.openapi.from_dict(description(server))[path]["POST"]
    statuses: dict[int, int] = {}

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case) -> None:
        reply = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
        assert reply.status_code < 500, (case.body, reply.text)

    send()
    assert sum(statuses.values()) >= EXAMPLES / 2, statuses
    if mode is GenerationMode.POSITIVE:
        assert statuses.get(200), statuses
    server.wait_until_idle()
    after = server.client.completions.create(**COMPLETION).choices[0]
    assert (after.text, after.logprobs) == (before.text, before.logprobs)
