"""Gemma 3, text: local and global layers, norms before and after each block, scaled embeddings."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxdet.models.config import ModelConfig, count, positive, read_config, rope_settings, sliding_layers
from jaxdet.models.layers import MLP, Attention, Batch, DecoderLM, RMSNorm
from jaxdet.models.weights import Weights
from pallas_kernels.reduce import pin

GLOBAL_EVERY = 6


class Gemma3Layer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); each sum is float32, rounded once."""

    def __init__(self, weights: Weights, config: ModelConfig, layer: int):
        self.input_norm = RMSNorm(weights / "input_layernorm", config, 1.0)
        self.attention = Attention(weights / "self_attn", config, layer, qk_norm=True, offset=1.0)
        self.post_attention_norm = RMSNorm(weights / "post_attention_layernorm", config, 1.0)
        self.pre_mlp_norm = RMSNorm(weights / "pre_feedforward_layernorm", config, 1.0)
        self.mlp = MLP(weights / "mlp", config)
        self.post_mlp_norm = RMSNorm(weights / "post_feedforward_layernorm", config, 1.0)

    def __call__(self, x, batch: Batch, rope, cache):
        y, cache = self.attention(x, self.input_norm, batch, rope, cache)
        x = _add(x, self.post_attention_norm(y))
        return _add(x, self.post_mlp_norm(self.mlp(x, self.pre_mlp_norm))), cache


class Gemma3(DecoderLM):
    """Gemma 3's text decoder."""

    norm_offset = 1.0

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        text = config.get("text_config") or config
        if not isinstance(text, dict):
            raise ValueError(f"config.json: text_config={text!r} must be an object; fetch the model again")
        config = {
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "head_dim": 256,
            **text,
        }
        shared = read_config(config, "gemma3")
        every = count(config, "sliding_window_pattern", GLOBAL_EVERY)
        local = sliding_layers(config, shared.num_layers)
        if local is None:
            local = [(i + 1) % every != 0 for i in range(shared.num_layers)]
        window = count(config, "sliding_window", 4096)
        return dataclasses.replace(
            shared,
            attention_scale=1.0 / math.sqrt(_number(config, "query_pre_attn_scalar") or shared.head_dim),
            soft_cap=_number(config, "attn_logit_softcapping"),
            logit_soft_cap=_number(config, "final_logit_softcapping"),
            windows=tuple(window if is_local else None for is_local in local),
            rope=_ropes(config),
            rope_of_layer=tuple(int(is_local) for is_local in local),
        )

    @staticmethod
    def make_layer(weights: Weights, config: ModelConfig, index: int) -> Gemma3Layer:
        return Gemma3Layer(weights, config, index)

    def embed(self, tokens):
        # The scale itself is rounded to the dtype first, as in the reference implementation.
        scale = jnp.asarray(math.sqrt(self.config.hidden_size), self.dtype)
        rows = super().embed(tokens)
        return pin((rows.astype(jnp.float32) * scale.astype(jnp.float32)).astype(self.dtype))


def _number(config: dict[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else positive(key, config[key])


def _ropes(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(global, local) rope settings, in transformers 5's nested form or the older two-theta form."""
    nested = config.get("rope_parameters") or {}
    if isinstance(nested, dict) and "full_attention" in nested:
        both = [
            rope_settings({**config, "rope_parameters": nested.get(k)})
            for k in ("full_attention", "sliding_attention")
        ]
        return both[0], both[1]
    theta = config.get("rope_theta") or 1_000_000.0
    local_theta = _number(config, "rope_local_base_freq") or 10_000.0
    local = {"rope_theta": local_theta, "rope_type": "default"}
    return rope_settings({**config, "rope_theta": theta}), local


def _add(x, y):
    return pin((x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype))
