"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

import dataclasses
from typing import Any

from jaxdet.models.config import ModelConfig, count, read_config, sliding_layers
from jaxdet.models.llama import Llama


class Qwen2(Llama):
    """Llama's layers; some checkpoints window the upper layers."""

    @staticmethod
    def read_config(config: dict[str, Any]) -> ModelConfig:
        shared = read_config(config, "qwen2")
        return dataclasses.replace(shared, qkv_bias=True, windows=upper_windows(config, shared.num_layers))


def upper_windows(config: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on slide when `use_sliding_window` is set; `layer_types` overrules."""
    slides = sliding_layers(config, layers)
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return (None,) * layers
    if slides is None:
        first = count(config, "max_window_layers", layers, smallest=0)
        slides = [i >= first for i in range(layers)]
    window = count(config, "sliding_window")
    return tuple(window if slide else None for slide in slides)
