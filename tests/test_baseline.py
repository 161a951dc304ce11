"""Plain JAX is the control: it must be a right implementation, so that its differences mean something."""

import numpy as np
import pytest

from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint

FAMILIES = ("llama", "llama_rope_scaling", "qwen2", "qwen3", "mistral", "mistral_window", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(references, family):
    with np.load(references / family / "reference.npz") as saved:
        exact, ids = saved["logits_float64"], saved["ids"]
    plain = Baseline(open_checkpoint(references / family), dtype="float32", max_model_len=64)
    for tokens, expected in zip(ids.tolist(), exact, strict=True):
        for chunk in (None, 20):
            error = np.abs(plain.logits(tokens, chunk=chunk) - expected).max() / np.abs(expected).max()
            assert error < 1e-5


def test_ragged_batch_continues_like_each_prompt_alone(references):
    plain = Baseline(open_checkpoint(references / "qwen3"), dtype="float32", max_model_len=64)
    prompts = [[5, 9, 2], [7] * 11, list(range(30))]
    together = plain.generate(prompts, 6)
    for prompt, (tokens, logits) in zip(prompts, together, strict=True):
        for chunk in (None, 4):
            ((alone, expected),) = plain.generate([prompt], 6, chunk=chunk)
            assert tokens == alone
            np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
