"""Our trainer's gradients beside plain JAX's, from the same samples and weights: their errors, and what a step gains.

    python benchmarks/rl_gradients.py [--steps 26] [--seeds 3] [--out out]

Along runs of the tiny model of `rl_on_policy.py`, every step's gradient is computed three times: by `jaxdet.rl` in
bfloat16, by plain JAX in bfloat16 (micro-batches of 8 sequences, their gradients added in float32), and by plain JAX
in float32 on the same bfloat16 weights, which counts as exact. From one and the same masters and optimizer state each
of them then takes a step of its own, whose gain is seen without noise: the probability of digits at every place of the
step's completions, by the float32 model on the new weights rounded to bfloat16. A trainer that learns more slowly
would gain less. Writes JSON.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rl_on_policy
import typer
from flax import nnx
from tqdm import tqdm

from jaxdet import LLM
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import Checkpoint, open_checkpoint
from jaxdet.models.origins import origins
from jaxdet.models.registry import family_of
from jaxdet.rl.grpo import GRPOConfig, _accumulation, _micro_batches, _seed, _zeros, prompt_order
from jaxdet.rl.rollouts import Sample, sample
from jaxdet.testing import write_tiny_model
from jaxdet.verify.report import environment

ROWS = 8
TOP = {"embedding": "model.embed_tokens", "head": "lm_head"}
"""Matrices of no layer, by the names that the plain model and Hugging Face have for them."""
Tensors = dict[str, jax.Array]


class Plain:
    """The plain model in one dtype, by Hugging Face's names."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, length: int):
        self.model, self.length = Baseline(checkpoint, dtype=dtype, max_model_len=length), length
        self.gradient = jax.jit(jax.grad(self._loss))
        self.digits = jax.jit(self._digits)

    def _logits(self, weights: Tensors, tokens):
        layers: list[Tensors] = [{} for _ in range(self.model.config.num_layers)]
        for name, value in weights.items():
            wide = jnp.asarray(value, jnp.float32 if value.ndim == 1 else self.model.dtype)
            if name.startswith("model.layers."):
                index, _, rest = name.removeprefix("model.layers.").partition(".")
                layers[int(index)][rest.removesuffix(".weight")] = wide.T
        top = {n: jnp.asarray(weights[f"{k}.weight"], self.model.dtype) for n, k in TOP.items()}
        params = {
            "embedding": top["embedding"],
            "head": top["head"].T,
            "norm": jnp.asarray(weights["model.norm.weight"], jnp.float32),
            "layers": layers,
            "rope": self.model.params["rope"],
        }
        start = jnp.zeros(len(tokens), jnp.int32)
        return self.model.forward(params, self.model.new_cache(len(tokens)), tokens, start, every=True)[0]

    def _loss(self, weights: Tensors, tokens, advantage):
        """Minus the objective where every importance ratio is 1."""
        found = jax.nn.log_softmax(self._logits(weights, tokens)[:, :-1])
        values = jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.exp(values - jax.lax.stop_gradient(values)) * advantage[:, :-1])

    def _digits(self, weights: Tensors, tokens, place):
        """The probability of a digit, averaged over the places of the output."""
        share = jax.nn.softmax(self._logits(weights, tokens))[..., 48:58].sum(-1)
        return jnp.sum(share * place) / jnp.sum(place)


def follow(checkpoint: Checkpoint, llm: LLM, seed: int, steps: int) -> list[dict[str, float]]:
    """One run of ours; figures of every step."""
    task, step_fn = rl_on_policy.digits(llm), llm.engine.step_fn
    config = GRPOConfig(max_tokens=task.max_tokens, seed=seed, micro_batch_tokens=2048)
    family = family_of(checkpoint.config)
    places = dict(nnx.to_flat_state(origins(family, step_fn.config, step_fn.dtype, step_fn.backend)))

    def named(tree: Any) -> Tensors:
        found = {}
        for path, value in nnx.to_flat_state(tree):
            found |= places[path].get_value().tensors(value[...], step_fn.config, step_fn.backend)
        return jax.tree.map(jnp.asarray, found)

    accumulate = _accumulation(step_fn.graph, step_fn.backend, config.clip, False)
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(task.learning_rate))
    masters = jax.tree.map(lambda x: jnp.array(x, jnp.float32), llm.params)
    packed_state, named_state = optimizer.init(masters), optimizer.init(named(masters))
    longest = max(len(p["prompt_token_ids"]) for p in task.prompts) + task.max_tokens
    narrow, wide = (Plain(checkpoint, dtype, longest) for dtype in ("bfloat16", "float32"))
    stepped = jax.jit(lambda w, g, state: optax.apply_updates(w, optimizer.update(g, state, w)[0]))
    history = []
    for number in tqdm(range(steps), desc=f"seed {seed}", unit="step"):
        order = prompt_order(len(task.prompts), config.prompts_per_step, number, seed)
        samples = sample(
            llm,
            [task.prompts[i] for i in order],
            task.reward,
            group_size=config.group_size,
            max_tokens=config.max_tokens,
            seeds=[_seed(seed, number, i) for i in range(len(order))],
        )
        sums = _zeros(masters)
        for micro, _, old, weight in _micro_batches(samples, config.micro_batch_tokens):
            sums, _ = accumulate(step_fn.state, sums, micro, old, weight)
        total, before = sums.total(), named(masters)
        weights = named(llm.params)
        tokens, advantage = _rows(samples, longest)
        found = {"ours": named(total), "plain": None, "exact": wide.gradient(weights, tokens, advantage)}
        for at in range(0, len(tokens), ROWS):
            rows = slice(at, at + ROWS)
            part = narrow.gradient(
                jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), weights), tokens[rows], advantage[rows]
            )
            found["plain"] = part if at == 0 else jax.tree.map(jnp.add, found["plain"], part)
        figures = {"step": number, "reward": float(np.mean([s.reward for s in samples]))}
        place = jnp.asarray(advantage != 0)
        figures["digits"] = float(wide.digits(weights, tokens, place))
        length = optax.global_norm(found["exact"])
        for name, gradient in found.items():
            new = stepped(before, gradient, named_state)
            rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, new)
            figures[f"gain {name}"] = float(wide.digits(rounded, tokens, place)) - figures["digits"]
            error = optax.global_norm(jax.tree.map(jnp.subtract, gradient, found["exact"]))
            along = optax.tree.vdot(gradient, found["exact"]) / length**2
            figures |= {f"error {name}": float(error / length), f"along {name}": float(along)}
        history.append(figures)
        changes, packed_state = optimizer.update(total, packed_state, masters)
        _, named_state = optimizer.update(found["ours"], named_state, before)
        masters: Any = optax.apply_updates(masters, changes)
        llm.update_weights(masters)
    return history


def _rows(samples: list[Sample], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, padded at the end, and advantage / output tokens of all at the places that chose them [B, length]."""
    count = sum(len(s.logprobs) for s in samples)
    tokens, advantage = (
        np.zeros((len(samples), length), np.int32),
        np.zeros((len(samples), length), np.float32),
    )
    for i, s in enumerate(samples):
        tokens[i, : len(s.tokens)] = s.tokens
        advantage[i, s.start - 1 : len(s.tokens) - 1] = s.advantage / count
    return tokens, advantage


def main(steps: int = 26, seeds: int = 3, out: Annotated[Path, typer.Option()] = Path("out")) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source = write_tiny_model(Path(folder) / "tiny")
        checkpoint, llm = open_checkpoint(source), LLM(source, dtype="bfloat16", max_model_len=128)
        first = jax.tree.map(lambda x: jnp.array(x, jnp.float32), llm.params)
        runs = []
        for seed in range(seeds):
            llm.update_weights(first)
            runs.append(follow(checkpoint, llm, seed, steps))
    every = [figures for run in runs for figures in run]
    summary = {}
    for name in ("ours", "plain"):
        lost = np.asarray([f[f"gain {name}"] - f["gain exact"] for f in every])
        summary[name] = {
            "mean error": float(np.mean([f[f"error {name}"] for f in every])),
            "mean along": float(np.mean([f[f"along {name}"] for f in every])),
            "mean gain": float(np.mean([f[f"gain {name}"] for f in every])),
            "mean gain beyond exact": float(lost.mean()),
            "its standard error": float(lost.std(ddof=1) / len(lost) ** 0.5),
        }
    summary["exact"] = {"mean gain": float(np.mean([f["gain exact"] for f in every]))}
    result = {"steps": steps, "seeds": seeds, "seconds": round(time.perf_counter() - began)}
    result |= environment(llm.engine.step_fn.backend, llm.dtype) | {"summary": summary, "runs": runs}
    out.mkdir(exist_ok=True)
    (out / "rl-gradients.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    typer.run(main)
