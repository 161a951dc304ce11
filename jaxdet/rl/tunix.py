"""jaxdet as the rollout worker of Google's Tunix (https://github.com/google/tunix), written against 0.1.7.

    ClusterConfig(rollout_engine=functools.partial(JaxdetRollout, llm=LLM("Qwen/Qwen3-0.6B")), ...)

Rollouts are then the same bits whatever the batch, and whatever else the engine runs. Tunix's trainer stays its own:
`jaxdet.rl.compare` says how far its logprobs are from the sampler's.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput  # type: ignore[import-not-found]

from jaxdet.llm import LLM
from jaxdet.rl.comparison import sampled_logprobs
from jaxdet.rl.layout import packed
from jaxdet.sampling_params import SamplingParams


class JaxdetRollout(BaseRollout):
    """A rollout worker over an `LLM`.

    Equal prompts of one call get different completions, and every call draws anew, from `rollout_config.seed` (0 by
    default) on: a run can be repeated to the same bits.

    Args:
        rollout_actor: Tunix's model of the Llama, Qwen2 or Qwen3 family; its weights are taken at once.
        tokenizer: Tunix's tokenizer adapter.
        mesh: not used; the engine runs on one device.
        rollout_config: limits of the engine come from `llm`, not from here.
        llm: the same architecture.
    """

    def __init__(
        self, *, rollout_actor: nnx.Module, tokenizer: Any, mesh: Any, rollout_config: Any, llm: LLM
    ):
        self._model, self._tokenizer, self.llm = rollout_actor, tokenizer, llm
        self._calls = 0
        self.update_params(nnx.state(rollout_actor, nnx.Param))

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **_: Any) -> RolloutOutput:
        """Completes every prompt once.

        Returns:
            Per completion its text, token ids [output] (int32) and, with `return_logprobs`, the sampler's logprobs
            [output] (float32); the prompts left-padded [B, max_prompt_length or the longest] (int32).
        """
        c = rollout_config
        ids = [self._encode(prompt) for prompt in prompts]
        seeds = np.random.SeedSequence([*_numbers(c.seed), self._calls]).generate_state(len(ids), np.uint64)
        self._calls += 1
        params = [
            SamplingParams(
                max_tokens=c.max_tokens_to_generate,
                temperature=c.temperature,
                top_p=1.0 if c.top_p is None else c.top_p,
                top_k=c.top_k or 0,
                seed=int(s),
                stop_token_ids=c.eos_tokens or [self.eos_id()],
                logprobs=0,
            )
            for s in seeds
        ]
        outputs = [out.outputs[0] for out in self.llm.generate(ids, params, use_tqdm=False)]
        longest = max(map(len, ids))
        width = max(c.max_prompt_length, longest)
        padded = np.full((len(ids), width), self.pad_id(), np.int32)
        for row, prompt in zip(padded, ids, strict=True):
            row[width - len(prompt) :] = prompt
        return RolloutOutput(
            text=[self._tokenizer.decode(list(o.token_ids)) for o in outputs],
            logits=None,
            tokens=[np.asarray(o.token_ids, np.int32) for o in outputs],
            left_padded_prompt_tokens=padded,
            logprobs=[sampled_logprobs(o) for o in outputs] if c.return_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: Int[Array, "B P"], completion_tokens: Int[Array, "B C"]
    ) -> Float[Array, "B C"]:
        """The engine's logprobs of the completions, bit-equal to what `generate` reported; 0 where they are padded."""
        pad = self.pad_id()
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        starts = [_first(row != pad) for row in prompts]
        ends = [len(row) - _first(row[::-1] != pad) for row in completions]
        sequences = [
            [*prompt[start:].tolist(), *completion[:end].tolist()]
            for prompt, start, completion, end in zip(prompts, starts, completions, ends, strict=True)
        ]
        found = np.zeros(completions.shape, np.float32)
        for row, end, score in zip(found, ends, self.llm.score(sequences), strict=True):
            row[:end] = score.logprobs[len(score.logprobs) - end :]
        return jnp.asarray(found)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Takes the trainer's weights, on the device; all of them: LoRA's must be merged first.

        Raises:
            RuntimeError: requests are running.
            ValueError: a parameter is unknown, missing or of another shape.
        """
        self.llm.update_weights(packed(self.llm, huggingface_tensors(params)))

    def pad_id(self) -> int:
        """What prompts are padded with, as Tunix asks for it."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """What ends a completion, as Tunix asks for it."""
        return self._tokenizer.eos_id()

    def model(self) -> nnx.Module:
        """Tunix's own model, which is trained; the engine runs copies of its weights."""
        return self._model

    def _encode(self, prompt: str) -> list[int]:
        bos, ids = self._tokenizer.bos_id(), list(self._tokenizer.encode(prompt))
        return [bos, *ids] if bos and ids[:1] != [bos] else ids


RULES: Sequence[tuple[str, str]] = (
    (r"embedder\.input_embedding", "model.embed_tokens.weight"),
    (r"final_norm\.w", "model.norm.weight"),
    (r"lm_head\.w", "lm_head.weight"),
    (r"layers\.(\d+)\.attn\.([qkvo])_proj\.w", r"model.layers.\1.self_attn.\2_proj.weight"),
    (r"layers\.(\d+)\.attn\.([qkv])_bias", r"model.layers.\1.self_attn.\2_proj.bias"),
    (r"layers\.(\d+)\.attn\.([qk])_norm\.w", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"layers\.(\d+)\.(\w+_layernorm)\.w", r"model.layers.\1.\2.weight"),
    (r"layers\.(\d+)\.mlp\.(\w+_proj)\.kernel", r"model.layers.\1.mlp.\2.weight"),
)
"""Tunix's names in its Llama, Qwen2 and Qwen3 models, and Hugging Face's."""


def huggingface_tensors(params: Any) -> dict[str, jax.Array]:
    """Tunix's parameters by Hugging Face's names and in its layouts.

    Raises:
        ValueError: a parameter's name is not one of Tunix's Llama, Qwen2 and Qwen3 models.
    """
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        for pattern, replacement in RULES:
            if re.fullmatch(pattern, name):
                target = re.sub(pattern, replacement, name)
                break
        else:
            raise ValueError(
                f"params: {name} is not a weight of Tunix's Llama, Qwen2 or Qwen3; merge LoRA, or use such a model"
            )
        if "o_proj" in target:  # [heads, head_dim, hidden]
            value = value.reshape(-1, value.shape[-1])
        elif value.ndim == 3:  # [hidden, heads, head_dim]
            value = value.reshape(value.shape[0], -1)
        elif target.endswith("bias"):
            value = value.reshape(-1)
        found[target] = value.T if value.ndim == 2 and "embed" not in target else value
    return found


def _numbers(seed: Any) -> list[int]:
    """A seed that may be None, a number or one of JAX's keys."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    return np.asarray(0 if seed is None else seed).ravel().tolist()


def _first(mask: np.ndarray) -> int:
    """Index of the first True; the length if there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
