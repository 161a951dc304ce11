"""Sampler and trainer agree over tens of thousands of tokens; benchmarks/rl_equality.py takes any number."""

import pytest
import rl_equality

from jaxdet.testing import write_tiny_model


@pytest.mark.slow
def test_equal_over_many_tokens(tmp_path, monkeypatch):
    """Greedy and sampled, with cached prefixes and with guesses, in ragged lengths."""
    monkeypatch.setattr(
        rl_equality, "LONGEST_OUTPUT", 200
    )  # shorter rounds, so that there is one of each kind
    *_, (counts, _) = rl_equality.measure(write_tiny_model(tmp_path / "model"), 40_000, "bfloat16")
    assert counts.tokens >= 40_000
    assert (counts.differing, counts.max_abs) == (0, 0.0)
    assert min(counts.greedy, counts.sampled) > 1000
    assert counts.cached_prompt_tokens > 1000
    assert counts.accepted_guesses > 100
    assert 0 < counts.control_differing <= counts.control_tokens
