"""Mistral: Llama with an optional sliding window in every layer."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, count, read_config
from jaxdet.models.llama import Llama


class Mistral(Llama):
    """Llama's layers, windowed."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "mistral")
        window = None if config.get("sliding_window") is None else count(config, "sliding_window")
        return dataclasses.replace(shared, windows=(window,) * shared.num_layers)
