"""Llama: SmolLM2, Llama 2 and 3.x (with rope scaling)."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, read_config
from jaxdet.models.layers import DecoderLayer, DecoderLM
from jaxdet.models.weights import Weights


class Llama(DecoderLM):
    """The plain pre-norm decoder."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "llama")
        bias = bool(config.get("attention_bias", False))
        return dataclasses.replace(shared, qkv_bias=bias, output_bias=bias)

    def __init__(self, weights: Weights, config: ModelConfig, max_model_len: int):
        layers = [
            DecoderLayer(weights / "model" / "layers" / str(i), config, i) for i in range(config.num_layers)
        ]
        super().__init__(weights, config, layers, max_model_len)
