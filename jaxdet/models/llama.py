"""Llama: SmolLM2, Llama 2 and 3.x (with rope scaling)."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, read_config
from jaxdet.models.layers import DecoderLM


class Llama(DecoderLM):
    """The plain pre-norm decoder."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "llama")
        bias = bool(config.get("attention_bias", False))
        return dataclasses.replace(shared, qkv_bias=bias, output_bias=bias)
