"""From a checkpoint's config to a model."""

from typing import Any

import jax.numpy as jnp

from jaxdet.heap import freed_at_once
from jaxdet.models.config import ModelConfig
from jaxdet.models.gemma3 import Gemma3
from jaxdet.models.layers import DecoderLM
from jaxdet.models.llama import Llama
from jaxdet.models.mistral import Mistral
from jaxdet.models.qwen2 import Qwen2
from jaxdet.models.qwen3 import Qwen3
from jaxdet.models.weights import TensorSource, Weights
from pallas_kernels.backend import resolve

FAMILIES = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "mistral": Mistral,
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
}


def family_of(config: dict[str, Any]) -> type[DecoderLM]:
    """The model class for `config["model_type"]`.

    Raises:
        ValueError: the architecture is not supported (named, with those that are).
    """
    kind = config.get("model_type", "unknown")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"architecture {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def backend_of(config: ModelConfig, dtype: jnp.dtype, backend: str | None) -> str:
    """Which kernels run such a model: `backend` itself, or the device's own for None.

    Raises:
        ValueError: the name is unknown.
    """
    return resolve(
        backend,
        dtype=dtype,
        head_dim=config.head_dim,
        num_q_heads=config.num_q_heads,
        num_kv_heads=config.num_kv_heads,
    )


def build_model(
    source: TensorSource,
    config: dict[str, Any],
    *,
    dtype: jnp.dtype,
    backend: str | None,
    max_model_len: int,
) -> DecoderLM:
    """Reads every tensor once and returns the model, its weights in the layout of its kernels (see `backend_of`)."""
    family = family_of(config)
    shape = family.read_config(config)
    kernels = backend_of(shape, dtype, backend)
    prefix = "language_model." if config["model_type"] == "gemma3" else ""
    with freed_at_once():
        return family(Weights(source, jnp.dtype(dtype), kernels, shape, prefix), shape, max_model_len)
