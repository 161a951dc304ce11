"""Does one trainer learn faster than another? Rewards of plain JAX and jaxdet over many seeds, in pairs.

    python benchmarks/rl_seeds.py [--steps 30] [--seeds 16] [--out out]

The task, model and first weights of `rl_on_policy.py`, and three trainings of every seed:

1. plain: plain JAX with importance weights, and its own sampler.
2. mixed: plain JAX's trainer, but jaxdet samples, from weights that are synced at every step. Its random numbers are
   jaxdet's, so what it differs in from the third is the trainer alone.
3. jaxdet.

Whether a curve lags is then a question of pairs: the difference of the mean reward over all steps, and of the first
step where the mean of three rewards reaches a half, each with its standard error over the seeds. Writes JSON.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from rl_on_policy import PlainGRPO, digits
from tqdm import tqdm

from jaxdet import LLM
from jaxdet.checkpoints import Checkpoint, open_checkpoint
from jaxdet.rl.grpo import GRPO, GRPOConfig, _seed
from jaxdet.rl.layout import packed
from jaxdet.rl.rollouts import sample
from jaxdet.testing import write_tiny_model
from jaxdet.verify.report import environment

TRAININGS = "plain", "mixed", "jaxdet"
PAIRS = ("jaxdet", "plain"), ("jaxdet", "mixed"), ("mixed", "plain")


class MixedGRPO(PlainGRPO):
    """Plain JAX's trainer on completions that jaxdet samples, with the random numbers of jaxdet's own run."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._sample = self._by_jaxdet

    def step(self, number: int) -> dict[str, float]:
        self._number = number
        return super().step(number)

    def _by_jaxdet(self, masters, prompts, lengths, _):
        c, ends = self.config, self.llm.tokenizer.eos_token_ids
        self.llm.update_weights(packed(self.llm, _by_name(masters)))
        asked = [row[:n].tolist() for row, n in zip(prompts, lengths, strict=True)][:: c.group_size]
        samples = sample(
            self.llm,
            asked,
            lambda *_: 0.0,  # the trainer asks for rewards itself
            group_size=c.group_size,
            max_tokens=c.max_tokens,
            seeds=[_seed(c.seed, self._number, i) for i in range(len(asked))],
        )
        tokens = np.full((len(samples), c.max_tokens), ends[0], np.int32)
        logprobs = np.zeros(tokens.shape, np.float32)
        for i, s in enumerate(samples):
            tokens[i, : len(s.logprobs)], logprobs[i, : len(s.logprobs)] = s.tokens[s.start :], s.logprobs
        return tokens, logprobs


def _by_name(masters) -> dict[str, jax.Array]:
    """Plain JAX's parameters by Hugging Face's names and in its layouts."""
    found = {
        "model.embed_tokens.weight": masters["embedding"],
        "model.norm.weight": masters["norm"],
        "lm_head.weight": masters["head"].T,
    }
    for i, layer in enumerate(masters["layers"]):
        found |= {f"model.layers.{i}.{name}.weight": value.T for name, value in layer.items()}
    return found


def rewards(checkpoint: Checkpoint, llm: LLM, first, seed: int, steps: int) -> dict[str, list[float]]:
    """Every step's mean reward, by training."""
    task = digits(llm)
    config = GRPOConfig(max_tokens=task.max_tokens, seed=seed, micro_batch_tokens=2048)
    found = {}
    for name, kind in (("plain", PlainGRPO), ("mixed", MixedGRPO)):
        trainer = kind(checkpoint, llm, task, config, importance_weights=True)
        found[name] = [trainer.step(number)["reward"] for number in range(steps)]
    llm.update_weights(first)
    ours = GRPO(llm, task.reward, optax.adamw(task.learning_rate), config)
    found["jaxdet"] = [m["reward"] for m in ours.train(task.prompts, steps, use_tqdm=False)]
    return found


def summary(runs: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Means of the trainings, and differences of pairs with their standard errors."""
    of = {name: np.asarray([run[name] for run in runs]) for name in TRAININGS}
    half = {name: np.asarray([_first_half(curve) for curve in curves]) for name, curves in of.items()}
    found = {
        name: {"mean reward": float(of[name].mean()), "steps to a half": float(half[name].mean())}
        for name in TRAININGS
    }
    for one, other in PAIRS:
        reward, lag = of[one].mean(1) - of[other].mean(1), half[one] - half[other]
        found[f"{one} − {other}"] = {
            "mean reward": float(reward.mean()),
            "its standard error": float(reward.std(ddof=1) / len(runs) ** 0.5),
            "steps to a half": float(lag.mean()),
            "standard error of the steps": float(lag.std(ddof=1) / len(runs) ** 0.5),
        }
    return found


def _first_half(curve: np.ndarray) -> int:
    """The first of three steps whose mean reward is a half; the number of steps if there is none."""
    reached = np.convolve(curve, np.ones(3) / 3, "valid") >= 0.5
    return int(reached.argmax()) if reached.any() else len(curve)


def main(steps: int = 30, seeds: int = 16, out: Path = Path("out")) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = write_tiny_model(Path(folder) / "tiny")
        checkpoint, llm = open_checkpoint(source), LLM(source, dtype="bfloat16", max_model_len=128)
        first = jax.tree.map(lambda x: jnp.array(x, jnp.float32), llm.params)
        runs = [rewards(checkpoint, llm, first, seed, steps) for seed in tqdm(range(seeds), unit="seed")]
    result = {"steps": steps, "seeds": seeds, "seconds": round(time.perf_counter() - began)}
    result |= environment(llm.engine.step_fn.backend, llm.dtype) | {"summary": summary(runs), "runs": runs}
    out.mkdir(exist_ok=True)
    (out / "rl-seeds.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result["summary"], indent=1, ensure_ascii=False))


if __name__ == "__main__":
    typer.run(main)
