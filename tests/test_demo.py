"""`jaxdet demo`: what a newcomer sees first."""

import io

import pytest
from rich.console import Console

from jaxdet.demo import PROMPTS, run_demo

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
def test_the_demo_answers_and_proves(demo_model):
    out = io.StringIO()
    assert run_demo(Console(file=out, width=100))
    text = out.getvalue()
    assert all(prompt in text for prompt in PROMPTS)
    assert "The capital of France is Paris." in text
    assert "first token after" in text
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in text.splitlines() if line.startswith("│")
    }
    ours = [row for name, row in rows.items() if name.startswith("jaxdet")]
    plain = [row for name, row in rows.items() if name.startswith("plain")]
    assert len(ours) == len(plain) == 3
    assert len({tuple(row) for row in ours}) == 1  # the same token ids, logits and 0 that differ
    assert len({row[1] for row in plain}) > 1  # negative control: plain JAX's logits moved
