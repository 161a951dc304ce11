"""Sampling parameters: what is accepted, and the one-line error for what is not."""

import math

import numpy as np
import pytest

from jaxdet import SamplingParams

WRONG = [
    ("n", (0, -1, 1.5, "2", None, True)),
    ("temperature", (-0.1, math.nan, math.inf, "1", None, True)),
    ("top_p", (0, -0.5, 1.01, math.nan, "0.9", None)),
    ("top_k", (-2, 1.5, "5", None)),
    ("min_p", (-0.1, 1.1, math.nan, "0")),
    ("repetition_penalty", (0, -1, math.nan, math.inf, 1e-46, "1")),
    ("presence_penalty", (-2.1, 2.1, math.nan, "1")),
    ("frequency_penalty", (-2.1, 2.1, math.nan, "1")),
    ("max_tokens", (0, -1, 2.5, "16", math.nan)),
    ("min_tokens", (-1, 17, 0.5, "1", None)),
    ("seed", (-1, 2**64, 0.5, "7")),
    ("stop", ("", ["a", ""], 5, [5], b"a")),
    ("stop_token_ids", (5, "5", [0.5], ["5"])),
    ("ignore_eos", ("yes", 1, None)),
    ("include_stop_str_in_output", ("no", 0)),
    ("skip_special_tokens", (1,)),
    ("logprobs", (-1, 21, 1.5, "3")),
    ("prompt_logprobs", (-1, 21, "3")),
    ("logit_bias", ({5: 101}, {5: -101}, {5: math.nan}, {"a": 1}, {5: "1"}, [5], 5)),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG for value in values])
def test_wrong_values_are_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value) and "must be" in str(caught.value)


def test_unknown_name():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)  # pyright: ignore


def test_numpy_numbers_and_none_are_welcome():
    p = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_p=1,
        seed=np.uint64(2**64 - 1),
        stop=None,
        stop_token_ids=np.array([1, 2]).tolist(),
        logit_bias={"5": 1, np.int32(6): np.float64(2)},
        max_tokens=None,
    )
    assert (p.n, p.temperature, p.top_p, p.seed) == (2, 0.5, 1.0, 2**64 - 1)
    assert (p.stop, p.stop_token_ids, p.logit_bias) == ((), (1, 2), {5: 1.0, 6: 2.0})
    assert all(type(v) in (int, float) for v in (p.n, p.temperature, p.top_p, p.seed))


def test_values_that_mean_the_same():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop="a") == SamplingParams(stop=["a"])
    assert SamplingParams(temperature=9e-6).temperature == 0
    assert SamplingParams(temperature=1e-5).temperature == 1e-5
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()
