"""RL with and without equal log-probabilities: reward, KL and gradient norm of three kinds of training.

    python benchmarks/rl_on_policy.py [MODEL] [--task digits|addition] [--steps 100] [--seeds 3] [--out out]

The experiment of "Defeating Nondeterminism in LLM Inference" (Thinking Machines 2025), section "True on-policy RL":

1. plain: sampler and trainer are the same plain JAX model (`jaxdet.baseline`) in bfloat16. The sampler decodes single
   tokens of a batch from a cache, the trainer sees whole sequences in micro-batches; their logprobs differ because
   their shapes do, nothing else. The trainer takes its own logprobs for the sampler's.
2. plain, importance weights: the same, with the ratio of the trainer's probability to the sampler's in the clipped
   objective.
3. jaxdet: `jaxdet.rl.grpo.GRPO`, where the logprobs are equal.

All begin with the same weights and see the same prompts in the same order; optimizer and objective are the same.
Without MODEL a tiny random one is trained, on a CPU in minutes. Writes JSON and a PNG.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from tqdm import tqdm

from jaxdet import LLM
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import Checkpoint, open_checkpoint
from jaxdet.outputs import CompletionOutput
from jaxdet.rl import compare
from jaxdet.rl.grpo import GRPO, GRPOConfig, objective, prompt_order
from jaxdet.rl.rollouts import advantages
from jaxdet.testing import write_tiny_model
from jaxdet.verify.report import environment

VARIANTS = "plain", "plain, importance weights", "jaxdet"
MEASURED = "reward", "kl", "grad_norm"


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts whose completions a program can check."""

    prompts: list[dict[str, Any]]
    reward: Callable[[Any, CompletionOutput], float]
    max_tokens: int
    learning_rate: float


def digits(llm: LLM) -> Task:
    """For a tiny model of bytes: write digits, whatever the prompt. The reward is their share."""

    def reward(_, completion: CompletionOutput) -> float:
        return sum(48 <= token < 58 for token in completion.token_ids) / len(completion.token_ids)

    prompts = [f"{letter}{number}" for letter in "abcdefgh" for number in range(8)]
    return Task([_encoded(llm, p) for p in prompts], reward, 16, 1e-3)


def addition(llm: LLM) -> Task:
    """For a chat model: sums of two numbers below 20. The reward is 1 if the first number of the answer is the sum."""

    def reward(prompt, completion: CompletionOutput) -> float:
        found = re.search(r"\d+", completion.text)
        return float(found is not None and int(found.group()) == prompt["sum"])

    prompts = []
    for a in range(20):
        for b in range(20):
            asked = f"What is {a} + {b}? Answer with the number only."
            prompts.append(dict(llm.chat_prompt([{"role": "user", "content": asked}]), sum=a + b))
    return Task(prompts, reward, 16, 1e-5)


TASKS = {"digits": digits, "addition": addition}


def _encoded(llm: LLM, text: str) -> dict[str, Any]:
    return {"prompt": text, "prompt_token_ids": llm.tokenizer.encode(text)}


class PlainGRPO:
    """GRPO as anybody would write it over plain JAX.

    Args:
        importance_weights: whether the objective's ratio is to the sampler's logprobs, or to the trainer's own.
        rows: sequences in a micro-batch of the trainer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        llm: LLM,
        task: Task,
        config: GRPOConfig,
        *,
        importance_weights: bool,
        rows: int = 8,
    ):
        self.llm, self.task, self.config = llm, task, config
        longest = max(len(p["prompt_token_ids"]) for p in task.prompts)
        self.length, self.rows, self.importance_weights = longest + task.max_tokens, rows, importance_weights
        self.model = Baseline(checkpoint, dtype="bfloat16", max_model_len=self.length)
        self._rope = self.model.params.pop("rope")
        if self.model.config.tied_embeddings:
            del self.model.params["head"]
        self._dtypes = jax.tree.map(lambda x: x.dtype, self.model.params)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(task.learning_rate)
        )
        self._sample = jax.jit(self._sample_all)
        self._gradient = jax.jit(jax.grad(self._loss, has_aux=True))

        @jax.jit
        def update(masters, state, gradient):
            changes, state = self.optimizer.update(gradient, state, masters)
            return optax.apply_updates(masters, changes), state, optax.global_norm(gradient)

        self._update = update
        self.begin(config.seed)

    def begin(self, seed: int) -> None:
        """From the model's own weights, with what has been compiled."""
        self.config = dataclasses.replace(self.config, seed=seed)
        self.masters = jax.tree.map(lambda x: jnp.array(x, jnp.float32), self.model.params)
        self.state = self.optimizer.init(self.masters)

    def _weights(self, masters) -> dict[str, Any]:
        """What the model runs with, cast from the masters."""
        cast = jax.tree.map(lambda x, dtype: x.astype(dtype), masters, self._dtypes)
        return {"head": cast["embedding"].T, "rope": self._rope} | cast

    def _sample_all(self, masters, prompts, lengths, key):
        """(tokens, logprobs) [B, max_tokens] from the model's own distribution, one token at a time from a cache."""
        weights, forward = self._weights(masters), self.model.forward
        count, every = len(lengths), jnp.arange(len(lengths))
        start = jnp.zeros(count, jnp.int32)
        logits, cache = forward(weights, self.model.new_cache(count), prompts, start, lengths - 1)

        def draw(logits, step):
            token = jax.random.categorical(jax.random.fold_in(key, step), logits)
            return token, jax.nn.log_softmax(logits)[every, token]

        def one(carry, step):
            cache, logits = carry
            token, logprob = draw(logits, step)
            logits, cache = forward(weights, cache, token[:, None], lengths + step)
            return (cache, logits[:, 0]), (token, logprob)

        _, found = jax.lax.scan(one, (cache, logits), jnp.arange(self.task.max_tokens))
        return jax.tree.map(jnp.transpose, found)

    def _loss(self, masters, tokens, old, weight):
        """Minus the objective of a micro-batch, and the trainer's logprobs of every next token [rows, length − 1]."""
        start = jnp.zeros(len(tokens), jnp.int32)
        cache = self.model.new_cache(len(tokens))
        logits, _ = self.model.forward(self._weights(masters), cache, tokens, start, every=True)
        values = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
        reference = old if self.importance_weights else jax.lax.stop_gradient(values)
        loss, _ = objective(
            values.reshape(-1), None, reference.reshape(-1), weight.reshape(-1), self.config.clip
        )
        return loss, values

    def step(self, number: int) -> dict[str, float]:
        c, longest = self.config, self.length - self.task.max_tokens
        order = prompt_order(len(self.task.prompts), c.prompts_per_step, number, c.seed)
        asked = [self.task.prompts[i] for i in order for _ in range(c.group_size)]
        lengths = np.asarray([len(p["prompt_token_ids"]) for p in asked], np.int32)
        prompts = np.zeros((len(asked), longest), np.int32)
        for row, prompt in zip(prompts, asked, strict=True):
            row[: len(prompt["prompt_token_ids"])] = prompt["prompt_token_ids"]
        key = jax.random.fold_in(jax.random.key(c.seed), number)
        tokens, logprobs = jax.device_get(self._sample(self.masters, prompts, lengths, key))
        outputs = [_until_end(row, self.llm.tokenizer.eos_token_ids) for row in tokens.tolist()]
        rewards = np.asarray(
            [
                self.task.reward(p, CompletionOutput(0, self.llm.tokenizer.decode(ids), ids))
                for p, ids in zip(asked, outputs, strict=True)
            ]
        )
        advantage = np.concatenate([advantages(group) for group in rewards.reshape(-1, c.group_size)])
        sampled = [row[: len(ids)] for row, ids in zip(logprobs, outputs, strict=True)]
        whole, old, weight = (
            np.zeros((len(asked), self.length), t) for t in (np.int32, np.float32, np.float32)
        )
        places, total = [], sum(map(len, outputs))
        for i, ids in enumerate(outputs):
            n = lengths[i]
            whole[i, :n], whole[i, n : n + len(ids)] = prompts[i, :n], ids
            places.append(slice(n - 1, n - 1 + len(ids)))
            old[i, places[i]], weight[i, places[i]] = sampled[i], advantage[i] / total
        gradient, seen = None, []
        for at in range(0, len(asked), self.rows):
            rows = slice(at, at + self.rows)
            part, values = self._gradient(self.masters, whole[rows], old[rows, :-1], weight[rows, :-1])
            gradient = part if gradient is None else jax.tree.map(jnp.add, gradient, part)
            seen.append(values)
        self.masters, self.state, norm = self._update(self.masters, self.state, gradient)
        values = np.concatenate(jax.device_get(seen))
        found = compare(sampled, [row[place] for row, place in zip(values, places, strict=True)])
        return {
            "step": number,
            "reward": float(rewards.mean()),
            "kl": found.kl,
            "max_logprob_difference": found.max_abs,
            "grad_norm": float(norm),
        }


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """An output up to its first end-of-sequence token, that included."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def run(
    checkpoint: Checkpoint,
    llm: LLM,
    name: str,
    variants: Sequence[str],
    *,
    steps: int,
    seeds: int,
    prompts_per_step: int,
    group_size: int,
) -> dict[str, list[list[dict[str, float]]]]:
    """Metrics by variant, seed and step.

    Args:
        llm: the checkpoint's model, in bfloat16.
        name: which task.
        prompts_per_step, group_size: see `GRPOConfig`.
    """
    first = jax.tree.map(lambda x: jnp.array(x, jnp.float32), llm.params)
    task = TASKS[name](llm)
    optimizer = optax.adamw(task.learning_rate)
    found: dict[str, list[list[dict[str, float]]]] = {}
    for variant in variants:
        found[variant], plain = [], None
        for seed in range(seeds):
            config = GRPOConfig(
                prompts_per_step=prompts_per_step,
                group_size=group_size,
                max_tokens=task.max_tokens,
                seed=seed,
                micro_batch_tokens=2048,
            )
            if variant == "jaxdet":
                llm.update_weights(first)
                history = GRPO(llm, task.reward, optimizer, config).train(task.prompts, steps)
            else:
                corrected = variant != VARIANTS[0]
                plain = plain or PlainGRPO(checkpoint, llm, task, config, importance_weights=corrected)
                plain.begin(seed)
                history = [plain.step(number) for number in tqdm(range(steps), desc=variant, unit="step")]
            found[variant].append([{k: m[k] for k in (*MEASURED, "max_logprob_difference")} for m in history])
    return found


def summary(found: dict[str, list[list[dict[str, float]]]]) -> dict[str, dict[str, float]]:
    """By variant: the reward of the first and last tenth, the largest KL and logprob difference, the median norm."""
    result = {}
    for variant, runs in found.items():
        rewards = np.asarray([[m["reward"] for m in history] for history in runs])
        tenth = max(1, rewards.shape[1] // 10)
        every = [m for history in runs for m in history]
        result[variant] = {
            "reward at first": float(rewards[:, :tenth].mean()),
            "reward at last": float(rewards[:, -tenth:].mean()),
            "lowest seed's at last": float(rewards[:, -tenth:].mean(axis=1).min()),
            "largest kl": max(m["kl"] for m in every),
            "median kl": float(np.median([m["kl"] for m in every])),
            "largest logprob difference": max(m["max_logprob_difference"] for m in every),
            "median grad norm": float(np.median([m["grad_norm"] for m in every])),
            "largest grad norm": max(m["grad_norm"] for m in every),
        }
    return result


def plot(found: dict[str, list[list[dict[str, float]]]], title: str, path: Path) -> None:
    """Mean over the seeds as a line, from the lowest to the highest seed as an area."""
    figure, axes = plt.subplots(1, len(MEASURED), figsize=(15, 4.2), layout="constrained")
    names = "reward", "KL(sampler ‖ trainer) a token", "gradient norm"
    for axis, measure, name in zip(axes, MEASURED, names, strict=True):
        for color, (variant, runs) in zip(("#c0392b", "#e08e0b", "#1f6f8b"), found.items(), strict=False):
            values = np.asarray([[m[measure] for m in history] for history in runs])
            steps = np.arange(values.shape[1])
            axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
            axis.plot(steps, values.mean(0), color=color, label=variant)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if measure == "kl":
            axis.set_yscale("symlog", linthresh=1e-7)
            axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    model: Annotated[str | None, typer.Argument(help="A tiny random one by default.")] = None,
    task: Literal["digits", "addition"] = "digits",
    steps: int = 100,
    seeds: int = 3,
    prompts_per_step: int = 8,
    group_size: int = 8,
    out: Path = Path("out"),
) -> None:
    began = time.perf_counter()
    sizes = dict(prompts_per_step=prompts_per_step, group_size=group_size)
    with tempfile.TemporaryDirectory() as folder:
        source = model or write_tiny_model(Path(folder) / "tiny")
        rollouts = prompts_per_step * group_size
        checkpoint = open_checkpoint(source)
        llm = LLM(
            source,
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=rollouts,
            max_num_batched_tokens=512,
            num_pages=2 * rollouts,  # the rest of the memory is the trainers'
        )
        result: dict[str, Any] = {
            "model": model or "tiny",
            "task": task,
            "steps": steps,
            "seeds": seeds,
        } | sizes
        result |= environment(llm.engine.step_fn.backend, llm.dtype)
        out.mkdir(exist_ok=True)
        found: dict[str, list[list[dict[str, float]]]] = {}
        for variant in VARIANTS:  # the last one trains the engine's own weights
            found |= run(checkpoint, llm, task, [variant], steps=steps, seeds=seeds, **sizes)
            seconds = round(time.perf_counter() - began)
            result |= {"seconds": seconds, "summary": summary(found), "runs": found}
            (out / "rl-on-policy.json").write_text(json.dumps(result) + "\n")
    title = f"{result['model']}, {task}, {seeds} seeds; bfloat16 on {result['device']}"
    plot(found, title, out / "rl-on-policy.png")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    typer.run(main)
