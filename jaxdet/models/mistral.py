"""Mistral: Llama with an optional sliding window in every layer."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, read_config
from jaxdet.models.llama import Llama


class Mistral(Llama):
    """Llama's layers, windowed."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "mistral")
        return dataclasses.replace(shared, windows=(config.get("sliding_window"),) * shared.num_layers)
