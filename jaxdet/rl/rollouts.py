"""What is sampled in a step of RL, and how it compares within its group."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxdet.llm import LLM, Prompt
from jaxdet.outputs import CompletionOutput
from jaxdet.rl.comparison import sampled_logprobs
from jaxdet.sampling_params import SamplingParams

Reward = Callable[[Prompt, CompletionOutput], float]
"""(the prompt as it was given, one completion) -> how good it is."""

SMALLEST_SPREAD = 1e-6
"""Added to a group's standard deviation."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion."""

    tokens: list[int]
    """Prompt and output."""
    start: int
    """Tokens of the prompt."""
    logprobs: Float[np.ndarray, " output"]
    """The sampler's, float32, of every output token."""
    reward: float
    """As `Reward` gave it."""
    advantage: float
    """Of the whole completion, among its group: see `advantages`."""


def sample(
    llm: LLM,
    prompts: Sequence[Prompt],
    reward: Reward,
    *,
    group_size: int,
    max_tokens: int,
    seeds: Sequence[int],
) -> list[Sample]:
    """`group_size` completions of every prompt from the model's own distribution, group after group.

    Args:
        prompts: as `LLM.generate` takes them; `reward` gets them back as they are.
        group_size, max_tokens: see `GRPOConfig`.
        seeds: one per prompt.

    Raises:
        FloatingPointError: the model's logits were NaN.
        ValueError: a reward is not a finite number.
    """
    params = [
        SamplingParams(n=group_size, temperature=1.0, max_tokens=max_tokens, seed=seed, logprobs=0)
        for seed in seeds
    ]
    samples = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        if any(c.finish_reason == "error" for c in output.outputs):
            raise FloatingPointError("the model's logits are NaN; lower the learning rate and resume")
        given = [reward(prompt, c) for c in output.outputs]
        rewards = np.asarray(given, np.float64)  # None becomes NaN
        if rewards.shape != (len(given),) or not np.isfinite(rewards).all():
            raise ValueError(f"reward gave {given}; it must give finite numbers")
        ids = list(output.prompt_token_ids)
        samples += [
            Sample(ids + list(c.token_ids), len(ids), sampled_logprobs(c), float(r), float(a))
            for c, r, a in zip(output.outputs, rewards, advantages(rewards), strict=True)
        ]
    return samples


def advantages(rewards: Float[np.ndarray, " group"]) -> Float[np.ndarray, " group"]:
    """(reward − the group's mean) / its standard deviation, float64; 0 where all are equal.

    Outcome supervision of GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2).
    """
    return (rewards - rewards.mean()) / (rewards.std() + SMALLEST_SPREAD)
