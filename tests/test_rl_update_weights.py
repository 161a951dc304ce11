"""New weights in a running LLM: the bits of a fresh one that was loaded with them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet import LLM, SamplingParams
from jaxdet.testing import write_tiny_model

PROMPTS = [list(range(3, 180)), [5, 6], list(range(3, 150))]
"""Long enough for the prefix cache to have pages of the old weights."""


def float32(params):
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def logprobs(llm: LLM) -> list[np.ndarray]:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=0, ignore_eos=True)
    found = []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        (completion,) = output.outputs
        chosen = zip(completion.token_ids, completion.logprobs or [], strict=True)
        found.append(np.asarray([entry[token].logprob for token, entry in chosen], np.float32))
    return found


def differing(one: list[np.ndarray], other: list[np.ndarray]) -> int:
    return sum(np.count_nonzero(a.view("u4") != b.view("u4")) for a, b in zip(one, other, strict=True))


def test_bits_of_a_fresh_model(tmp_path, monkeypatch):
    folders = [write_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    llm, fresh = (LLM(folder, dtype="bfloat16", max_model_len=256) for folder in folders)
    before, expected = logprobs(llm), logprobs(fresh)
    masters, place = float32(fresh.params), _pointers(llm)
    assert llm.update_weights(masters) > 0
    assert _pointers(llm) == place, "the new weights lie where the old ones lay"
    found = logprobs(llm)
    assert sum(map(len, found)) == 36
    assert differing(found, expected) == 0
    assert differing(found, before) > 0, "the comparison would see the old weights"
    assert llm.weights_digest == fresh.weights_digest
    assert not any(x.is_deleted() for x in jax.tree.leaves(masters))
    monkeypatch.setattr(llm.engine.pool, "clear", lambda: None)
    llm.update_weights(jax.tree.map(lambda x: x * 2, masters))
    monkeypatch.undo()
    stale = logprobs(llm)
    llm.engine.pool.clear()
    assert differing(stale, logprobs(llm)) > 0, "the comparison would see pages of other weights"


def _pointers(llm: LLM) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(llm.params)]


def test_refusals(tmp_path):
    llm = LLM(write_tiny_model(tmp_path / "model"), dtype="bfloat16", max_model_len=256)
    digest, params = llm.weights_digest, float32(llm.params)
    request = llm.submit([1, 2, 3], SamplingParams(max_tokens=4))
    with pytest.raises(RuntimeError, match=r"^1 sequences are running or waiting; finish or abort them"):
        llm.update_weights(params)
    llm.abort(request)
    graph = jax.tree.structure(params)
    wrong = jax.tree.map(lambda x: x[:-1], params)
    shape, cut = (re.escape(str(list(jax.tree.leaves(p["embedding"])[0].shape))) for p in (params, wrong))
    with pytest.raises(ValueError, match=rf"^params: \['embedding'\].value is float32{cut} but must be"):
        llm.update_weights(wrong)
    with pytest.raises(ValueError, match=rf"is int32{shape} but must be floats"):
        llm.update_weights(jax.tree.unflatten(graph, [x.astype(jnp.int32) for x in jax.tree.leaves(params)]))
    del params["embedding"]
    with pytest.raises(
        ValueError, match=r"^params: \['embedding'\].value is missing; use the tree of llm.params"
    ):
        llm.update_weights(params)
    llm._weights_digest = None
    assert llm.weights_digest == digest, "a refusal changes nothing"
