"""Qwen3: no biases, an RMSNorm on every query and key head."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, read_config
from jaxdet.models.layers import DecoderLayer, DecoderLM
from jaxdet.models.qwen2 import upper_windows
from jaxdet.models.weights import Weights


class Qwen3(DecoderLM):
    """Pre-norm decoder with q/k norm."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "qwen3")
        bias = bool(config.get("attention_bias", False))
        return dataclasses.replace(
            shared, qkv_bias=bias, output_bias=bias, windows=upper_windows(config, shared.num_layers)
        )

    @staticmethod
    def make_layer(weights: Weights, config: ModelConfig, index: int) -> DecoderLayer:
        return DecoderLayer(weights, config, index, qk_norm=True)
