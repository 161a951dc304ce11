"""The shape of a model, read from a Hugging Face `config.json` dictionary."""

import dataclasses
import math
from typing import Any

import numpy as np

from pallas_kernels.matmul.op import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
MAX_COUNT = 2**24
"""No model's vocabulary, width or context is longer; a damaged file's count must not fill the memory."""

ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the layers need to know; every family reads the same fields."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    tied_embeddings: bool
    activation: Activation
    attention_scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    soft_cap: float | None = None
    logit_soft_cap: float | None = None
    windows: tuple[int | None, ...] = ()
    """Per layer: how many keys a query sees, or None for all."""
    rope: tuple[dict[str, Any], ...] = dataclasses.field(default=(), hash=False)
    """The distinct rope settings ("rope_theta", "rope_type", …)."""
    rope_of_layer: tuple[int, ...] = ()
    """Per layer: its index in `rope`."""


def read_config(config: dict[str, Any], family: str) -> ModelConfig:
    """Reads the fields that Llama-like families share; a family's own file amends them.

    Raises:
        ValueError: a field is missing, or asks for something that is not implemented (named).
    """
    heads, hidden, layers, vocab, inner = (
        count(config, key)
        for key in (
            "num_attention_heads",
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "intermediate_size",
        )
    )
    kv_heads = count(config, "num_key_value_heads", heads)
    head_dim = count(config, "head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ValueError(
            f"config.json: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads} "
            f"and head_dim={head_dim} even; fetch the model again"
        )
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        max_position=count(config, "max_position_embeddings", 2048),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        activation=ACTIVATIONS[activation],
        attention_scale=1.0 / math.sqrt(head_dim),
        windows=(None,) * layers,
        rope=(rope_settings(config),),
        rope_of_layer=(0,) * layers,
    )


def count(config: dict[str, Any], key: str, default: int | None = None, *, smallest: int = 1) -> int:
    """The whole number that `config` gives for `key`; `default` where it gives none.

    Raises:
        ValueError: it is missing, no whole number or out of range.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ValueError(f"config.json has no {key!r}; is this a complete checkpoint?")
    if type(value) is not int or not smallest <= value <= MAX_COUNT:
        raise ValueError(
            f"config.json: {key}={value!r} must be a whole number from {smallest} to {MAX_COUNT}"
        )
    return value


def positive(key: str, value: Any) -> float:
    """`value` as a float, if it is a positive finite number."""
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key}={value!r} must be a positive number")
    return float(value)


def sliding_layers(config: dict[str, Any], layers: int) -> list[bool] | None:
    """Per layer, whether `layer_types` says that its attention slides; None without the field."""
    types = config.get("layer_types")
    if types is None:
        return None
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind not in ("full_attention", "sliding_attention") for kind in types)
    ):
        raise ValueError(
            f"config.json: layer_types must hold full_attention or sliding_attention for each of the {layers} "
            "layers; fetch the model again"
        )
    return [kind == "sliding_attention" for kind in types]


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rope settings in one dictionary, from transformers 5 (`rope_parameters`) or before (`rope_scaling`)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"config.json: rope_parameters={given!r} must be an object; fetch the model again")
    scaling = dict(given)
    scaling["rope_type"] = scaling.get("rope_type") or scaling.pop("type", None) or "default"
    if not isinstance(scaling["rope_type"], str):
        raise ValueError(f"config.json: rope_type={scaling['rope_type']!r} must be a string")
    scaling.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    positive("rope_theta", scaling["rope_theta"])
    scaling.setdefault("max_position", config.get("max_position_embeddings", 2048))
    return scaling


def inverse_frequencies(settings: dict[str, Any], head_dim: int) -> np.ndarray:
    """Radians per token for each of head_dim / 2 pairs, float64.

    Types: "default" (Su et al. 2021), "linear" (position interpolation, Chen et al. 2023), "llama3" (Llama 3.1).

    Raises:
        ValueError: any other rope type, by name.
    """
    for field in ROPE_FIELDS.get(settings["rope_type"], ()):
        if field not in settings:
            raise ValueError(f"config.json: rope_type {settings['rope_type']!r} needs {field!r}")
        positive(field, settings[field])
    frequencies = settings["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match settings["rope_type"]:
        case "default":
            return frequencies
        case "linear":
            return frequencies / settings["factor"]
        case "llama3":
            low, high = settings["low_freq_factor"], settings["high_freq_factor"]
            if high <= low:
                raise ValueError(f"config.json: high_freq_factor={high} must be above low_freq_factor={low}")
            original = settings["original_max_position_embeddings"]
            wavelength = 2 * np.pi / frequencies
            smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
            return (1 - smooth) * frequencies / settings["factor"] + smooth * frequencies
        case "factors":  # GGUF: one divisor per pair, computed by the converter
            return frequencies / np.asarray(settings["factors"], np.float64)
        case other:
            raise ValueError(f"rope_type {other!r} is not supported; supported: default, linear, llama3")
