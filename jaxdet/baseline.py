"""Plain jitted JAX: the same models as anybody would write them, with `jnp.dot` and a static cache.

The negative control of the demo, of `jaxdet verify` and of the benchmarks. It is fast and correct, and its bits depend
on the batch, on the chunks and on the path, because XLA is free to sum in another order for another shape.
"""

import functools
import itertools
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdet.checkpoints import Checkpoint
from jaxdet.models.config import ModelConfig, inverse_frequencies
from jaxdet.models.registry import family_of
from pallas_kernels.rope_cache.op import rope_table

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}

Cache = list[tuple[jax.Array, jax.Array]]
"""Per layer (keys, values), each [B, max_model_len, Hkv, D]."""


class Baseline:
    """A decoder of any supported family, without jaxdet's kernels.

    Args:
        checkpoint: the model.
        dtype: of weights, activations and cache.
        max_model_len: length of the static cache.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: str, max_model_len: int):
        family = family_of(checkpoint.config)
        self.config = family.read_config(checkpoint.config)
        self.dtype, self.max_model_len = jnp.dtype(dtype), max_model_len
        prefix = "language_model." if checkpoint.config["model_type"] == "gemma3" else ""
        self.params = _load(checkpoint, self.config, prefix, self.dtype, family.norm_offset)
        self.params["rope"] = [
            jnp.asarray(rope_table(inverse_frequencies(r, self.config.head_dim), max_model_len))
            for r in self.config.rope
        ]
        self.forward = jax.jit(
            functools.partial(_forward, self.config), static_argnames="every", donate_argnames="cache"
        )

    def new_cache(self, batch: int) -> Cache:
        """Zeroed keys and values for `batch` sequences of max_model_len tokens."""
        c = self.config
        shape = (batch, self.max_model_len, c.num_kv_heads, c.head_dim)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(c.num_layers)]

    def logits(self, tokens: Sequence[int], *, chunk: int | None = None) -> Float[np.ndarray, "T V"]:
        """float32 logits at every token of one sequence, computed `chunk` tokens at a time (all at once by default)."""
        cache, parts = self.new_cache(1), []
        for at in range(0, len(tokens), chunk or len(tokens)):
            ids = jnp.asarray([tokens[at : at + (chunk or len(tokens))]], jnp.int32)
            logits, cache = self.forward(self.params, cache, ids, jnp.asarray([at]), every=True)
            parts.append(np.asarray(logits[0]))
        return np.concatenate(parts)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk: int | None = None
    ) -> list[tuple[list[int], Float[np.ndarray, "max_tokens V"]]]:
        """Greedy continuations of right-padded prompts, with the logits that chose each token.

        Args:
            chunk: prefill this many tokens at a time; all at once by default.
        """
        steps = self.decode(prompts, chunk=chunk)
        kept = [np.asarray(next(steps))]
        tokens = [kept[0].argmax(1)]
        for _ in range(1, max_tokens):
            kept.append(np.asarray(steps.send(tokens[-1])))
            tokens.append(kept[-1].argmax(1))
        return [([int(t[i]) for t in tokens], np.stack([k[i] for k in kept])) for i in range(len(prompts))]

    def decode(
        self, prompts: Sequence[Sequence[int]], *, chunk: int | None = None
    ) -> Generator[Float[Array, "B V"], Int[np.ndarray, " B"]]:
        """Yields the float32 logits after right-padded prompts; `send` the chosen tokens and get the next ones.

        Args:
            chunk: prefill this many tokens at a time; all at once by default.
        """
        lengths = np.array([len(p) for p in prompts], np.int32)
        # Whole chunks where they fit, so that prompts of any length run the same program.
        width = (
            lengths.max() if chunk is None else min(-(-lengths.max() // chunk) * chunk, self.max_model_len)
        )
        padded = np.zeros((len(prompts), width), np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = prompt
        cache, logits = self.new_cache(len(prompts)), None
        for at in range(0, width, chunk or width):
            part = padded[:, at : at + (chunk or width)]
            last = np.clip(lengths - 1 - at, 0, part.shape[1] - 1)
            start = np.full(len(prompts), at, np.int32)
            found, cache = self.forward(self.params, cache, part, start, last)
            here = (lengths - 1 >= at) & (lengths - 1 < at + part.shape[1])
            logits = found if logits is None else jnp.where(here[:, None], found, logits)
        assert logits is not None
        for position in itertools.count():
            tokens = yield logits
            found, cache = self.forward(self.params, cache, tokens[:, None], lengths + position)
            logits = found[:, 0]


def _load(checkpoint: Checkpoint, c: ModelConfig, prefix: str, dtype, offset: float) -> dict[str, Any]:
    """Parameters by their Hugging Face names; matrices as [in, out], norms in float32."""

    def read(name: str) -> jax.Array:
        value = checkpoint.read(prefix + name)
        if value.ndim == 1:
            return jnp.asarray(value, jnp.float32) + (offset if "norm" in name else 0.0)
        return jnp.asarray(value, dtype) if "embed" in name else jnp.asarray(value.T, dtype)

    layers: list[dict[str, jax.Array]] = [{} for _ in range(c.num_layers)]
    for name in checkpoint.tensors:
        if name.startswith(stem := f"{prefix}model.layers."):
            index, _, rest = name.removeprefix(stem).partition(".")
            layers[int(index)][rest.removesuffix(".weight")] = read(name.removeprefix(prefix))
    embedding = read("model.embed_tokens.weight")
    head = embedding.T if c.tied_embeddings else read("lm_head.weight")
    return {"embedding": embedding, "head": head, "norm": read("model.norm.weight"), "layers": layers}


def _forward(
    c: ModelConfig,
    params: dict[str, Any],
    cache: Cache,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    last: Int[Array, " B"] | None = None,
    *,
    every: bool = False,
) -> tuple[jax.Array, Cache]:
    """float32 logits of the row at `last` [B, V], or of all rows [B, T, V]; T = 1 gives [B, 1, V]."""
    x = params["embedding"][tokens]
    if c.family == "gemma3":
        x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
    positions = start[:, None] + jnp.arange(tokens.shape[1])
    written = []
    for index, (layer, kv) in enumerate(zip(params["layers"], cache, strict=True)):
        angles = params["rope"][c.rope_of_layer[index]][positions][:, :, None]
        x, kv = decoder_layer(c, layer, x, positions, start, angles, c.windows[index], kv)
        written.append(kv)
    if last is not None:
        x = x[jnp.arange(x.shape[0]), last]
    elif not every:
        x = x[:, -1:]
    return lm_head(c, params, x), written


def decoder_layer(c: ModelConfig, layer, x, positions, start, angles, window, kv):
    """One layer: the new x and the new (keys, values)."""
    y = _norm(x, layer["input_layernorm"], c)
    y, kv = _attention(c, layer, y, positions, start, angles, window, kv)
    sandwiched = "pre_feedforward_layernorm" in layer  # Gemma
    if sandwiched:
        y = _norm(y, layer["post_attention_layernorm"], c)
    x = x + y
    y = _norm(x, layer["pre_feedforward_layernorm" if sandwiched else "post_attention_layernorm"], c)
    gate = ACTIVATIONS[c.activation](jnp.dot(y, layer["mlp.gate_proj"]))
    y = jnp.dot(gate * jnp.dot(y, layer["mlp.up_proj"]), layer["mlp.down_proj"])
    return x + (_norm(y, layer["post_feedforward_layernorm"], c) if sandwiched else y), kv


def lm_head(c: ModelConfig, params, x):
    """float32 logits of x."""
    logits = jnp.dot(_norm(x, params["norm"], c), params["head"], preferred_element_type=jnp.float32)
    if c.logit_soft_cap is not None:
        logits = jnp.tanh(logits / c.logit_soft_cap) * c.logit_soft_cap
    return logits


def _attention(c: ModelConfig, layer, x, positions, start, angles, window, kv):
    q, k, v = (
        (jnp.dot(x, layer[f"self_attn.{n}_proj"]) + layer.get(f"self_attn.{n}_proj.bias", 0.0)).astype(
            x.dtype
        )
        for n in "qkv"
    )
    q, k, v = (a.reshape(*x.shape[:2], -1, c.head_dim) for a in (q, k, v))
    if "self_attn.q_norm" in layer:
        q, k = _norm(q, layer["self_attn.q_norm"], c), _norm(k, layer["self_attn.k_norm"], c)
    q, k = _rotate(q, angles), _rotate(k, angles)
    put = jax.vmap(lambda old, new, at: lax.dynamic_update_slice(old, new, (at, 0, 0)))
    keys, values = put(kv[0], k, start), put(kv[1], v, start)
    grouped = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    scores = scores * c.attention_scale
    if c.soft_cap is not None:
        scores = jnp.tanh(scores / c.soft_cap) * c.soft_cap
    at = jnp.arange(keys.shape[1])
    visible = at <= positions[..., None]
    if window is not None:
        visible &= at > positions[..., None] - window
    probs = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).astype(x.dtype)
    out = jnp.einsum("bkgts,bskd->btkgd", probs, values).reshape(*x.shape[:2], -1)
    y = jnp.dot(out, layer["self_attn.o_proj"]) + layer.get("self_attn.o_proj.bias", 0.0)
    return y.astype(x.dtype), (keys, values)


def _norm(x, weight, c: ModelConfig):
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + c.norm_eps)
    return (wide * inverse * weight).astype(x.dtype)


def _rotate(x, angles):
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.split(angles, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
