"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, read_config
from jaxdet.models.llama import Llama


class Qwen2(Llama):
    """Llama's layers; some checkpoints window the upper layers."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "qwen2")
        return dataclasses.replace(shared, qkv_bias=True, windows=upper_windows(config, shared.num_layers))


def upper_windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide when `use_sliding_window` is set; `layer_types` overrules."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if (types := config.get("layer_types")) is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    first = int(config.get("max_window_layers", layers))
    return tuple(window if i >= first else None for i in range(layers))
