"""A trainer's logprobs beside the sampler's, counted."""

import numpy as np
import pytest

from jaxdet.outputs import CompletionOutput, Logprob, RequestOutput
from jaxdet.rl import compare

SAMPLED = [np.array([-1.0, -2.0, -0.5], np.float32), np.array([-3.0], np.float32)]


def test_equal():
    found = compare(SAMPLED, [x.tolist() for x in SAMPLED])
    assert (found.compared, found.differing, found.max_abs, found.mean_abs, found.kl) == (4, 0, 0.0, 0.0, 0.0)
    assert found.counts.sum() == 0
    assert str(found).splitlines()[1].split() == ["equal", "4", "█" * 40]


def test_differences():
    """An exact power of ten belongs to the bin below; one ulp counts."""
    trained = [np.array([-1.0, np.nextafter(np.float32(-2), np.float32(0)), -0.5 + 1e-3]), np.array([17.0])]
    found = compare(SAMPLED, trained)
    assert (found.compared, found.differing, found.max_abs) == (4, 3, 20.0)
    delta = np.array([0, 2.0**-23, 1e-3, 20])
    np.testing.assert_allclose(found.mean_abs, delta.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.kl, np.mean(np.exp(delta) - 1 - delta), rtol=1e-6)
    bins = dict(zip(found.edges[1:].tolist(), found.counts.tolist(), strict=True))
    assert {edge: n for edge, n in bins.items() if n} == {1e-6: 1, 1e-2: 1, np.inf: 1}
    lines = str(found).splitlines()
    assert lines[0].startswith("4 tokens compared, 3 differ; max |Δ| 20, ")
    assert lines[-1].split() == [">", "1e+01", "1", "█" * 40]
    assert len(lines) == 2 + len(found.counts)
    edges = compare([[0.0] * 2], [[1e-3, np.nextafter(1e-3, 1)]])
    assert {e: n for e, n in zip(edges.edges[1:].tolist(), edges.counts.tolist(), strict=True) if n} == {
        1e-3: 1,
        1e-2: 1,
    }


def test_completions():
    entries = [{5: Logprob(-1.5, 2), 7: Logprob(-0.2, 1)}, {3: Logprob(-0.25, 1)}]
    completion = CompletionOutput(0, "", [5, 3], logprobs=entries)
    assert compare([completion], [[-1.5, -0.25]]).differing == 0
    assert compare([completion], [[-0.2, -0.25]]).differing == 1
    two = RequestOutput("0", "", [1], [completion, completion])
    assert compare([two, completion], [[-1.5, -0.25]] * 3).compared == 6
    with pytest.raises(ValueError, match=r"sample with SamplingParams\(logprobs=0\)$"):
        compare([CompletionOutput(0, "", [5])], [[-1.5]])


def test_refusals():
    for trained, message in (
        (SAMPLED[:1], "sampled has 2 completions and trained 1; give the same, 1 or more"),
        (
            [SAMPLED[0], []],
            r"completion 1: sampled has shape \(1,\) and trained \(0,\); give one logprob per",
        ),
        ([SAMPLED[0], [np.nan]], "completion 1 has a logprob that is not finite; compare those of"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            compare(SAMPLED, trained)
    with pytest.raises(ValueError, match=r"^sampled holds no token; give at least one$"):
        compare([[]], [[]])
