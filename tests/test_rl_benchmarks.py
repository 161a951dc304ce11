"""The experiment's script: plain JAX is off-policy where jaxdet is not."""

import json

import pytest
import rl_gradients
import rl_on_policy
import rl_seeds
import train_step

from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.testing import write_tiny_model

SIZES = dict(prompts_per_step=2, group_size=3)


def test_plain_jax_is_off_policy(tmp_path):
    """The control of every 0.0: the same measure sees that plain JAX's trainer has other logprobs than its sampler."""
    folder = write_tiny_model(tmp_path / "model")
    llm = LLM(folder, dtype="bfloat16", max_model_len=128)
    found = rl_on_policy.run(
        open_checkpoint(folder), llm, "digits", rl_on_policy.VARIANTS[:1], steps=1, seeds=1, **SIZES
    )
    ((metrics,),) = found["plain"]
    assert 0 < metrics["kl"] < 1e-3
    assert 0 < metrics["max_logprob_difference"] < 0.2
    assert metrics["grad_norm"] > 0


def test_until_end():
    assert rl_on_policy._until_end([1, 2, 9, 3], [9]) == [1, 2, 9]
    assert rl_on_policy._until_end([1, 2], [9]) == [1, 2]


@pytest.mark.slow
def test_three_curves(tmp_path):
    rl_on_policy.main(steps=2, seeds=1, **SIZES, out=tmp_path)
    result = json.loads((tmp_path / "rl-on-policy.json").read_text())
    assert list(result["runs"]) == list(rl_on_policy.VARIANTS)
    ours, plain = result["summary"]["jaxdet"], result["summary"]["plain, importance weights"]
    assert (ours["largest kl"], ours["largest logprob difference"]) == (0.0, 0.0)
    assert plain["largest kl"] > 0
    assert (tmp_path / "rl-on-policy.png").stat().st_size > 10_000


@pytest.mark.slow
def test_pairs_and_gradients(tmp_path):
    """The scripts behind what docs/rl.md says about the three curves, at their smallest."""
    rl_seeds.main(steps=2, seeds=2, out=tmp_path)
    result = json.loads((tmp_path / "rl-seeds.json").read_text())
    assert [len(run[name]) for run in result["runs"] for name in rl_seeds.TRAININGS] == [2] * 6
    mixed, ours = ([run[name][0] for run in result["runs"]] for name in ("mixed", "jaxdet"))
    assert mixed == ours != [run["plain"][0] for run in result["runs"]], (
        "samples of the first step are shared"
    )
    rl_gradients.main(steps=2, seeds=1, out=tmp_path)
    found = json.loads((tmp_path / "rl-gradients.json").read_text())["summary"]
    for name in ("ours", "plain"):
        assert 0.001 < found[name]["mean error"] < 0.1
        assert 0.99 < found[name]["mean along"] < 1.01
        assert found[name]["mean gain"] > 0


@pytest.mark.slow
def test_both_sides_of_a_training_step_compute_the_same(tmp_path):
    train_step.main(
        shape=train_step.Shape.tiny,
        micro_batches=2,
        sequences=2,
        length=100,
        remat=train_step.Remat.on,
        repeats=1,
        out=tmp_path / "train-step.json",
    )
    (run,) = json.loads((tmp_path / "train-step.json").read_text())["runs"]
    ours, plain = run["ours"], run["plain"]
    assert plain["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    assert plain["gradient norm"] == pytest.approx(ours["gradient norm"], rel=1e-2)
    assert ours["cuts"]["differ"] == 0 < ours["cuts"]["control differs"] < ours["cuts"]["compared"]
    assert run["plain / ours"] > 0
