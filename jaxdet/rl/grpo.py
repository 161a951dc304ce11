"""GRPO, truly on-policy: the trainer's log-probabilities are the sampler's, to the last bit.

One step: every prompt gets a group of completions, rewards are compared within the group, and the clipped objective of
PPO weighs each token by its group-relative advantage (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1).
Every token of a step weighs alike, however long its completion (Yu et al. 2025, https://arxiv.org/abs/2503.14476,
section 3.3), and no term holds the model to a reference. Masters are float32 in the layout of the kernels' weights;
after the update one program casts them into the engine's weights, which the trainer's own forward pass reads too: there
is one copy of each.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxdet.engine.digest import weights_digest
from jaxdet.llm import LLM, Prompt, as_list
from jaxdet.rl.comparison import compare
from jaxdet.rl.gradients import GradientSums, accumulate
from jaxdet.rl.metrics import MetricsLog
from jaxdet.rl.optimize import update
from jaxdet.rl.packing import MicroBatch, pack
from jaxdet.rl.rollouts import Reward, Sample, sample
from jaxdet.rl.training_state import TrainingState
from pallas_kernels.backend import compiler_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of a run.

    Raises:
        ValueError: a value is out of range or of the wrong type.
    """

    prompts_per_step: int = 8
    """Different prompts of one step, as long as there are as many."""
    group_size: int = 8
    """Completions of each prompt, compared with each other; at least 2."""
    max_tokens: int = 64
    """Of one completion."""
    updates_per_step: int = 1
    """Optimizer steps on the same completions; from the second on the importance ratio is no longer 1."""
    clip: float = 0.2
    """How far the importance ratio may leave 1."""
    max_grad_norm: float = 1.0
    """A longer gradient is shortened to this."""
    seed: int = 0
    """Of the prompts' order and of all samples."""
    micro_batch_tokens: int = 4096
    """Most tokens, padding included, of one forward and backward pass; changes memory and speed, and no bit."""
    remat: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same bits."""

    def __post_init__(self):
        for name, smallest in (
            ("prompts_per_step", 1),
            ("group_size", 2),
            ("max_tokens", 1),
            ("updates_per_step", 1),
            ("seed", 0),
            ("micro_batch_tokens", 1),
        ):
            _check_whole(name, value := getattr(self, name), smallest)
            object.__setattr__(self, name, int(value))  # JSON takes no number of NumPy's
        for name in ("clip", "max_grad_norm"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not float(value) > 0:
                raise ValueError(f"{name}={value!r} must be a number above 0")
            object.__setattr__(self, name, float(value))

    @property
    def settings(self) -> dict[str, Any]:
        """What bits depend on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("micro_batch_tokens", "remat")}


class GRPO:
    """Trains all weights of an `LLM` in place; two runs with the same arguments end with the same bits.

    Args:
        llm: what samples and is trained; it must run nothing else while a step is taken.
        reward: scores a completion.
        optimizer: an elementwise optax optimizer, such as `optax.adamw(1e-6)`: weights are packed, so rows and columns
            mean nothing to it.
        config: settings.
        directory: for checkpoints and metrics; a run that is found there goes on from its last checkpoint.
        save_every: steps from one checkpoint to the next; the last step has one as well.

    Raises:
        ValueError: the run in `directory` had other settings, another model or another kind of optimizer;
            `save_every` is below 1.
    """

    def __init__(
        self,
        llm: LLM,
        reward: Reward,
        optimizer: optax.GradientTransformation,
        config: GRPOConfig,
        *,
        directory: str | Path | None = None,
        save_every: int = 10,
    ):
        self.llm, self.reward, self.config, self._optimizer = llm, reward, config, optimizer
        _check_whole("save_every", save_every, 1)
        self.finished_steps = 0
        self._save_every = save_every
        self.masters: nnx.State = jax.tree.map(lambda x: jnp.array(x, jnp.float32), llm.params)
        """The float32 weights, in the layout of `llm.params`."""
        self._optimizer_state = jax.jit(optimizer.init)(self.masters)
        self._accumulate = _accumulation(
            llm.engine.step_fn.graph, llm.engine.step_fn.backend, config.clip, config.remat
        )
        self._directory = None if directory is None else Path(directory)
        self._saved = None
        if self._directory is not None:
            self._saved = TrainingState(self._directory / "checkpoints", config.settings)
            if (step := self._saved.last_step) is not None:
                self.masters, self._optimizer_state = self._saved.restore(
                    (self.masters, self._optimizer_state)
                )
                self.finished_steps = step
                llm.update_weights(self.masters)

    def digest(self) -> str:
        """Digest of every bit of the float32 masters."""
        return weights_digest(self.masters)

    def train(
        self, prompts: Sequence[Prompt], steps: int, *, use_tqdm: bool = True
    ) -> list[dict[str, float]]:
        """Takes steps until `steps` of them are finished, those before a resumption included.

        Args:
            prompts: at least one; all of them are gone through in an order of `config.seed`, then again in another. A
                dictionary may hold more than {"prompt": …}, such as the answer that `reward` expects.
            steps: of the whole run.
            use_tqdm: show a progress bar.

        Returns:
            The metrics of the steps taken now; see `step`.

        Raises:
            FloatingPointError: logits or a gradient are not finite; the last checkpoint is as it was.
            ValueError: there is no prompt, `LLM.generate` refuses one, a reward is not a finite number, or a sequence
                is longer than `micro_batch_tokens`.
        """
        prompts = as_list(prompts)
        log = None if self._directory is None else MetricsLog(self._directory, self.finished_steps)
        history = []
        try:
            with tqdm(
                total=steps, initial=self.finished_steps, desc="GRPO", unit="step", disable=not use_tqdm
            ) as bar:
                while self.finished_steps < steps:
                    chosen = prompt_order(
                        len(prompts), self.config.prompts_per_step, self.finished_steps, self.config.seed
                    )
                    metrics = self.step([prompts[i] for i in chosen])
                    history.append(metrics)
                    if log is not None:
                        log.write(metrics)
                    if self._saved and (
                        self.finished_steps % self._save_every == 0 or self.finished_steps == steps
                    ):
                        self._saved.save(self.finished_steps, (self.masters, self._optimizer_state))
                    bar.set_postfix(reward=f"{metrics['reward']:.3f}", kl=metrics["kl"], refresh=False)
                    bar.update()
        finally:
            if log is not None:
                log.close()
        return history

    def step(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Samples, compares, updates and refreshes the sampler's weights.

        Returns:
            step: steps finished before it.
            reward, reward_std: mean and standard deviation over all completions.
            kl: estimate of KL(sampler ‖ trainer) per token before the update, mean of ratio − 1 − log ratio.
            max_logprob_difference: largest |trainer's − sampler's| of any token before the update.
            grad_norm: before clipping, of the last update.
            clipped: share of tokens whose gradient the clipping stopped, in the last update.
            output_tokens: sampled in all; mean_length: a completion.
            sample_seconds, train_seconds, refresh_seconds: refresh is the cast into the sampler's weights.

        Raises:
            FloatingPointError, ValueError: see `train`.
        """
        c, number, prompts = self.config, self.finished_steps, as_list(prompts)
        started = time.perf_counter()
        samples = sample(
            self.llm,
            prompts,
            self.reward,
            group_size=c.group_size,
            max_tokens=c.max_tokens,
            seeds=[_seed(c.seed, number, i) for i in range(len(prompts))],
        )
        sampled = time.perf_counter()
        batches = _micro_batches(samples, c.micro_batch_tokens)
        metrics: dict[str, float] = {}
        refresh_seconds = 0.0
        for turn in range(c.updates_per_step):
            sums, seen = _zeros(self.masters), []
            for micro, _, old, weight in batches:
                sums, values = self._accumulate(self.llm.engine.step_fn.state, sums, micro, old, weight)
                seen.append(values)
            self.masters, self._optimizer_state, norm = update(
                self._optimizer, c.max_grad_norm, self.masters, self._optimizer_state, sums
            )
            if not np.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient of step {number} is not finite; resume with a lower rate"
                )
            trained = _logprobs_of(samples, batches, jax.device_get(seen))
            if turn == 0:
                found = compare([s.logprobs for s in samples], trained)
                metrics |= {"kl": found.kl, "max_logprob_difference": found.max_abs}
            refresh_seconds += self.llm.update_weights(self.masters)
            metrics |= {"grad_norm": float(norm), "clipped": _clipped(samples, trained, c.clip)}
        self.finished_steps += 1
        rewards, count = np.asarray([s.reward for s in samples]), sum(len(s.logprobs) for s in samples)
        return {
            "step": number,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            **metrics,
            "output_tokens": count,
            "mean_length": count / len(samples),
            "sample_seconds": sampled - started,
            "train_seconds": time.perf_counter() - sampled - refresh_seconds,
            "refresh_seconds": refresh_seconds,
        }


def _check_whole(name: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {smallest}")


def prompt_order(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which of `count` prompts a step takes: all in one shuffled order, then all in another."""
    chosen: list[int] = []
    while len(chosen) < per_step:
        number, place = divmod(step * per_step + len(chosen), count)
        order = np.random.default_rng([seed, number]).permutation(count)
        chosen += order[place : place + per_step - len(chosen)].tolist()
    return chosen


def objective(
    values: Float[Array, " T"],
    _: MicroBatch | None,
    old: Float[Array, " T"],
    weight: Float[Array, " T"],
    clip: float,
) -> tuple[Float[Array, ""], Float[Array, " T"]]:
    """−Σ min(ratio · weight, clip(ratio) · weight), and the trainer's logprobs.

    The clipped surrogate of PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, equation 7).

    Args:
        values: log-probabilities under the weights in training, float32.
        old: the sampler's, float32.
        weight: advantage / output tokens of the whole batch, float32; 0 where nothing was sampled.
        clip: see `GRPOConfig`.
    """
    ratio = jnp.exp(values - old)
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip)
    # Not `minimum`: at equality it halves the gradient and adds the halves, a sum that may round in two ways.
    free = jax.lax.stop_gradient(ratio * weight <= bounded * weight)
    return -jnp.sum(jnp.where(free, ratio, jax.lax.stop_gradient(bounded)) * weight), values


_zeros = jax.jit(GradientSums.zeros)


@functools.cache
def _accumulation(graph: nnx.GraphDef, backend: str, clip: float, remat: bool) -> Callable:
    """The compiled forward and backward pass of a micro-batch; the sums are donated."""

    def run(state, sums: GradientSums, micro: MicroBatch, old, weight):
        bounded = functools.partial(objective, clip=clip)
        return accumulate(nnx.merge(graph, state), sums, micro, bounded, old, weight, remat=remat)

    return jax.jit(run, donate_argnums=1, compiler_options=compiler_options(backend))


_Prepared = tuple[MicroBatch, list[slice], Float[np.ndarray, " T"], Float[np.ndarray, " T"]]
"""A micro-batch, where each sample's tokens are, the sampler's logprobs, and advantage / output tokens."""


def _micro_batches(samples: list[Sample], micro_batch_tokens: int) -> list[_Prepared]:
    count = sum(len(s.logprobs) for s in samples)
    left, prepared = iter(samples), []
    for micro, where in pack([s.tokens for s in samples], micro_batch_tokens):
        old, weight = (np.zeros(micro.targets.shape, np.float32) for _ in range(2))
        for rows in where:
            s = next(left)
            output = _output(rows, s)
            old[output], weight[output] = s.logprobs, s.advantage / count
        prepared.append((micro, where, old, weight))
    return prepared


def _output(rows: slice, s: Sample) -> slice:
    """The places whose targets are the sample's output tokens."""
    return slice(rows.start + s.start - 1, rows.stop - 1)


def _logprobs_of(
    samples: list[Sample], batches: list[_Prepared], seen: list[np.ndarray]
) -> list[Float[np.ndarray, " output"]]:
    """The trainer's, per sample."""
    left, found = iter(samples), []
    for (_, where, _, _), values in zip(batches, seen, strict=True):
        found += [values[_output(rows, next(left))] for rows in where]
    return found


def _clipped(samples: list[Sample], trained: list[Float[np.ndarray, " output"]], clip: float) -> float:
    """Share of tokens that have no gradient because their ratio went too far already."""
    stopped = []
    for s, values in zip(samples, trained, strict=True):
        ratio = np.exp(values - s.logprobs)
        stopped.append(ratio > 1 + clip if s.advantage > 0 else (ratio < 1 - clip) & (s.advantage < 0))
    return float(np.concatenate(stopped).mean())


def _seed(*numbers: int) -> int:
    """A sampling seed of its own for every prompt of every step."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
