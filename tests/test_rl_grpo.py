"""Training ends with the same bits: again, in other micro-batches, after an interruption; and is always on-policy."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdet import LLM
from jaxdet.rl import grpo, rollouts
from jaxdet.rl.grpo import GRPO, GRPOConfig
from jaxdet.testing import write_tiny_model
from pallas_kernels.matmul import op as matmul_op

PROMPTS = [f"{number}{letter}" for number in range(6) for letter in "ab"] + ["a long prompt " * 12]
CONFIG = dict(prompts_per_step=4, group_size=4, max_tokens=9, updates_per_step=2)
STEPS = 4
SECONDS = "sample_seconds", "train_seconds", "refresh_seconds"
SCRIPT = Path(__file__)
GUIDE = SCRIPT.parents[1] / "docs" / "rl.md"


def share_of_digits(_, completion) -> float:
    return sum(48 <= token < 58 for token in completion.token_ids) / len(completion.token_ids)


def without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in metrics.items() if k not in SECONDS} for metrics in history]


class Runs:
    """One LLM for many runs, each from the same weights."""

    def __init__(self, folder: Path, dtype: str = "bfloat16"):
        self.llm = LLM(folder, dtype=dtype, max_model_len=256)
        self._first = jax.tree.map(lambda x: jnp.array(x, jnp.float32), self.llm.params)
        self.optimizer = optax.adamw(1e-3)

    def new(self, reward=share_of_digits, directory=None, **config) -> GRPO:
        self.llm.update_weights(self._first)
        config = GRPOConfig(**CONFIG | {"micro_batch_tokens": 1024} | config)
        return GRPO(self.llm, reward, self.optimizer, config, directory=directory, save_every=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(write_tiny_model(tmp_path_factory.mktemp("rl") / "model"))


@pytest.fixture(scope="module")
def whole(runs) -> tuple[str, list[dict]]:
    """Digest and metrics of the run that all others are held to."""
    trainer = runs.new()
    history = trainer.train(PROMPTS, STEPS, use_tqdm=False)
    assert runs.llm.stats().pages_in_use == 0
    return trainer.digest(), history


def test_on_policy_at_every_step(whole):
    _, history = whole
    assert [m["step"] for m in history] == list(range(STEPS))
    assert [(m["kl"], m["max_logprob_difference"]) for m in history] == [(0.0, 0.0)] * STEPS
    assert sum(m["output_tokens"] for m in history) >= STEPS * 16
    assert all(m["grad_norm"] > 0 for m in history)


def test_one_ulp_would_show(runs, monkeypatch):
    def off_by_one_ulp(*args, **options):
        samples = rollouts.sample(*args, **options)
        samples[3].logprobs[0] = np.nextafter(samples[3].logprobs[0], np.float32(-np.inf))
        return samples

    monkeypatch.setattr(grpo, "sample", off_by_one_ulp)
    (metrics,) = runs.new().train(PROMPTS, 1, use_tqdm=False)
    assert metrics["kl"] > 0
    assert metrics["max_logprob_difference"] > 0


def test_same_run_same_bits(runs, whole):
    trainer = runs.new()
    history = trainer.train(PROMPTS, STEPS, use_tqdm=False)
    assert (trainer.digest(), without_times(history)) == (whole[0], without_times(whole[1]))


def test_other_micro_batches(runs, whole):
    trainer = runs.new(micro_batch_tokens=256, remat=True)
    history = trainer.train(PROMPTS, STEPS, use_tqdm=False)
    assert (trainer.digest(), without_times(history)) == (whole[0], without_times(whole[1]))


def test_other_seed_other_bits(runs, whole):
    trainer = runs.new(seed=1)
    trainer.train(PROMPTS, STEPS, use_tqdm=False)
    assert trainer.digest() != whole[0]


def test_resumed_to_the_same_bits(runs, whole, tmp_path):
    calls = 0

    def interrupted(prompt, completion) -> float:
        nonlocal calls
        calls += 1
        if calls == 3 * 16 + 5:
            raise KeyboardInterrupt
        return share_of_digits(prompt, completion)

    with pytest.raises(KeyboardInterrupt):
        runs.new(interrupted, tmp_path).train(PROMPTS, STEPS, use_tqdm=False)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # cut off
    trainer = runs.new(directory=tmp_path)
    assert trainer.finished_steps == 2, "step 2 was finished but not saved"
    trainer.train(PROMPTS, STEPS, use_tqdm=False)
    assert trainer.digest() == whole[0]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert without_times(written) == without_times(whole[1])
    assert any((tmp_path / "tensorboard").iterdir())
    again = runs.new(directory=tmp_path)
    assert (again.finished_steps, again.digest()) == (STEPS, whole[0])
    assert again.train(PROMPTS, STEPS, use_tqdm=False) == []
    with pytest.raises(
        ValueError, match=r"^seed=1, but the run in .* has 0; use that, or another directory$"
    ):
        runs.new(directory=tmp_path, seed=1)
    with pytest.raises(
        ValueError, match=r"^the run in .* has another model or another kind of optimizer; use"
    ):
        GRPO(runs.llm, share_of_digits, optax.sgd(1e-3), trainer.config, directory=tmp_path)


def test_padding_stays_zero(runs):
    """Masters are packed: what fills up a block is never moved."""
    trainer = runs.new()
    trainer.train(PROMPTS, 1, use_tqdm=False)
    c, backend = runs.llm.engine.step_fn.config, runs.llm.engine.step_fn.backend
    head = trainer.masters["head"][...]
    plain = matmul_op.unpack(head, c.hidden_size, c.vocab_size, backend)
    assert (np.asarray(plain) != 0).all()
    np.testing.assert_array_equal(matmul_op.pack(plain, backend), head)


def test_objective():
    """Against its definition, on both sides of the clip; at equality the gradient is the advantage itself."""
    rng = np.random.default_rng(0)
    old, a = (rng.standard_normal(400).astype(np.float32) for _ in range(2))
    values = old + rng.standard_normal(400).astype(np.float32) * 0.5
    values[:50] = old[:50]
    found, gradient = jax.value_and_grad(lambda v: grpo.objective(v, None, old, a, 0.2)[0])(values)
    ratio = np.exp(values.astype(np.float64) - old)
    expected = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    np.testing.assert_allclose(found, expected.sum(), rtol=1e-5)
    free = ratio * a <= np.clip(ratio, 0.8, 1.2) * a
    assert 0 < free.sum() < 400
    np.testing.assert_allclose(gradient, np.where(free, -ratio * a, 0), rtol=1e-5)
    np.testing.assert_array_equal(gradient[:50], -a[:50])


def test_prompt_order():
    """Every pass takes each prompt once, in an order of its own, also where a step spans passes."""
    taken = [i for step in range(6) for i in grpo.prompt_order(8, 4, step, 3)]
    passes = [taken[:8], taken[8:16], taken[16:]]
    assert all(sorted(each) == list(range(8)) for each in passes)
    assert len(set(map(tuple, passes))) == 3
    assert grpo.prompt_order(3, 8, 0, 0) == [i for step in range(8) for i in grpo.prompt_order(3, 1, step, 0)]
    assert grpo.prompt_order(8, 4, 0, 3) != grpo.prompt_order(8, 4, 0, 4)


def test_advantages():
    rewards = np.array([0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(rollouts.advantages(rewards), [-1, 1, 1, -1], rtol=1e-5)
    np.testing.assert_array_equal(rollouts.advantages(np.ones(3)), 0)


def test_refusals(runs):
    with pytest.raises(ValueError, match=r"^group_size=1 must be a whole number of at least 2$"):
        GRPOConfig(group_size=1)
    with pytest.raises(ValueError, match=r"^max_tokens=2.5 must be a whole number of at least 1$"):
        GRPOConfig(max_tokens=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^clip=0 must be a number above 0$"):
        GRPOConfig(clip=0)
    with pytest.raises(ValueError, match=r"^prompts is empty; give at least one prompt$"):
        runs.new().train([], 1)
    with pytest.raises(ValueError, match=r"^save_every=0 must be a whole number of at least 1$"):
        GRPO(runs.llm, share_of_digits, runs.optimizer, GRPOConfig(), save_every=0)
    with pytest.raises(ValueError, match=r"^reward gave \[None, .*; it must give finite numbers$"):
        runs.new(lambda *_: None).train(PROMPTS, 1, use_tqdm=False)
    with pytest.raises(ValueError, match=r"^reward gave .*; it must give finite numbers$"):
        runs.new(lambda *_: float("nan")).train(PROMPTS, 1, use_tqdm=False)


@pytest.mark.slow
def test_the_guide(tmp_path, monkeypatch, capsys):
    """The loop of docs/rl.md, with a tiny model and two steps, run twice; the forward pass; and comparing."""
    loop, own, comparing, *_ = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    folder = write_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(loop.replace("smollm2-135m", str(folder)).replace("steps=200", "steps=2"), found := {})
    assert [(m["step"], m["kl"]) for m in found["history"]] == [(0, 0.0), (1, 0.0)]
    assert (tmp_path / "runs" / "addition" / "metrics.jsonl").exists()
    exec(loop.replace("smollm2-135m", str(folder)).replace("steps=200", "steps=2"), again := {})
    assert (again["history"], again["trainer"].digest()) == ([], found["trainer"].digest())
    capsys.readouterr()
    exec(own, found)
    assert capsys.readouterr().out.startswith("16 tokens compared, 0 differ")
    exec(comparing, {})


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """kill -9 at random moments, until a process gets through; then the digest is the uninterrupted run's."""
    folder = write_tiny_model(tmp_path / "model")
    expected = _digest(_start(folder, tmp_path / "whole"))
    rng, kills, process = random.Random(0), 0, None
    while kills < 4:
        process = _start(folder, tmp_path / "killed")
        lines = _lines(tmp_path / "killed")
        while process.poll() is None and _lines(tmp_path / "killed") == lines:
            time.sleep(0.01)
        time.sleep(rng.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    assert _digest(_start(folder, tmp_path / "killed")) == expected


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _start(folder: Path, directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, directory],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def _digest(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return out.split()[-1]


if __name__ == "__main__":
    trainer = Runs(Path(sys.argv[1])).new(directory=Path(sys.argv[2]))
    trainer.train(PROMPTS, 12, use_tqdm=False)
    print(trainer.digest())
