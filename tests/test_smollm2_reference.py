"""SmolLM2-135M-Instruct in float32 against transformers: tokenizer, template, tokens, logits, perplexity."""

import json

import numpy as np
import pytest

from jaxdet import LLM, SamplingParams

LOGIT_STEPS = (0, 1, 31)
"""The output tokens whose logits the reference holds."""
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llm(demo_model):
    return LLM(demo_model, dtype="float32", max_num_seqs=8, max_model_len=1024, keep_logits=True)


@pytest.fixture(scope="module")
def entries(request):
    return json.loads((request.path.parent / "references/smollm2/prompts.json").read_text())


@pytest.fixture(scope="module")
def saved(request):
    with np.load(request.path.parent / "references/smollm2/reference.npz") as file:
        return dict(file)


def test_tokenizer_and_template(llm, entries, references, saved):
    for entry in entries:
        prompt = llm.chat_prompt([{"role": "user", "content": entry["prompt"]}])
        assert prompt == {"prompt": entry["text"], "prompt_token_ids": entry["ids"]}
    passage = (references / "smollm2/passage.txt").read_text(encoding="utf-8")
    assert llm.tokenizer.encode(passage) == saved["passage_ids"].tolist()


def test_greedy_tokens_and_logits(llm, entries, saved):
    """64 tokens of each prompt; none of them is a near tie (the two best logits are 0.01 apart or more)."""
    assert saved["gaps"].min() > 1e-2
    sequences = [s for e in entries for s in llm.engine.add(e["ids"], GREEDY)]
    while llm.engine.has_work:
        llm.engine.step()
    for sequence, entry, reference in zip(sequences, entries, saved["logits"], strict=True):
        assert sequence.output == entry["output"], entry["prompt"]
        found = np.stack([sequence.logits[i] for i in LOGIT_STEPS])
        error = np.abs(found - reference).max() / np.abs(reference).max()
        assert error <= 1e-4, f"{entry['prompt']}: {error:.1e}"
        np.testing.assert_array_equal(found.argmax(1), reference.argmax(1))


def test_perplexity(llm, saved):
    ids = saved["passage_ids"].tolist()
    (scored,) = llm.score([ids])
    assert len(scored.logprobs) == len(ids) - 1
    expected = saved["passage_nll"] / (len(ids) - 1)
    found = -np.sum(scored.logprobs, dtype=np.float64) / (len(ids) - 1)
    assert abs(np.exp(found - expected) - 1) < 1e-3
