"""Random models for tests, examples and benchmarks: tiny checkpoints with a tokenizer, and models of any size."""

import dataclasses
import functools
import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxdet.models.layers import DecoderLM
from jaxdet.models.registry import backend_of, family_of
from jaxdet.models.weights import Weights, tensor_shape
from jaxdet.tokenizer import Tokenizer
from pallas_kernels.matmul import op as matmul_op

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The tiny models' tokens beside the 256 bytes; the first begins a text, the first and the last end one."""
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""The tiny models' number of tokens."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""The tiny models' config.json, as far as they share it."""
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape, for `random_model`."""
QWEN3_8B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
"""Qwen3-8B's shape, for `random_model`."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 70},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 24,
        "sliding_window": 70,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}
"""What each family's config changes in COMMON."""


def write_tiny_model(folder: str | Path, family: str = "llama", *, seed: int = 0, **config: Any) -> Path:
    """Writes a Hugging Face folder with 2 layers, 259 tokens and float32 weights that every machine gets alike.

    The head favours printable ASCII, so that completions are text.

    Args:
        folder: must not exist yet.
        family: one of `FAMILIES`.
        seed: which random weights.
        config: what else to change in config.json, such as hidden_size=576.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = {"model_type": family} | COMMON | FAMILIES[family] | config
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_tensors(config, seed), folder / "model.safetensors")
    byte_tokenizer().save(folder)
    return folder


def random_model(
    config: dict[str, Any], *, dtype: jnp.dtype, backend: str | None, max_model_len: int, seed: int = 0
) -> DecoderLM:
    """A model of any size, its weights drawn on the device (normal, standard deviation 0.02; norms 1, biases 0).

    Args:
        config: as a config.json; only shapes matter.
        dtype: of weights and activations.
        backend: "xla", "mosaic_gpu" or "mosaic_tpu"; None takes the device's own.
        max_model_len: positions of the RoPE tables.
        seed: which random weights.
    """
    family = family_of(config)
    shape = family.read_config(config)
    kernels = backend_of(shape, dtype, backend)
    weights = _RandomWeights(_NoSource(), jnp.dtype(dtype), kernels, shape, seed=seed)
    return family(weights, shape, max_model_len)


@dataclasses.dataclass(frozen=True)
class _RandomWeights(Weights):
    """Draws each tensor, in the layout that layers use, instead of reading it."""

    seed: int = 0

    def vector(self, *names: str, offset: float = 0.0) -> jax.Array:
        size = sum(tensor_shape(self.prefix + name, self.config)[0] for name in names)
        return jnp.full(size, float(not names[0].endswith("bias")), jnp.float32)

    def matrix(self, *names: str) -> jax.Array:
        shapes = [tensor_shape(self.prefix + name, self.config) for name in names]
        size = sum(shape[0] for shape in shapes)
        return _draw_packed(self._key(names[0]), (shapes[0][1], size), 1, self.dtype, self.backend)

    def gated(self, gate: str, up: str) -> jax.Array:
        size, k = tensor_shape(self.prefix + gate, self.config)
        return _draw_packed(self._key(gate), (k, size), 2, self.dtype, self.backend)

    def _key(self, name: str) -> jax.Array:
        return jax.random.key(zlib.crc32(f"{self.prefix}{name}/{self.seed}".encode()))


class _NoSource:
    def read(self, name: str) -> np.ndarray:
        raise AssertionError(f"{name} is drawn, not read")


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _draw_packed(key, shape, halves, dtype, backend):
    drawn = [
        jax.random.normal(k, shape, dtype) * jnp.asarray(0.02, dtype) for k in jax.random.split(key, halves)
    ]
    pack = matmul_op.pack if halves == 1 else matmul_op.pack_gated
    return pack(*drawn, backend=backend)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and three special tokens after them; the chat template is ChatML."""
    order = _byte_characters()
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(order)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(
        backend,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        eos_token_ids=[256, 258],
        chat_template=CHAT_TEMPLATE,
    )


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself if it is printable, else the next unused code point."""
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b if b in own else next(others)) for b in range(256)]


def _tensors(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    family, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    gemma, dim = family == "gemma3_text", config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCAB_SIZE, hidden),
        "norm.weight": (hidden,),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
    for i in range(config["num_hidden_layers"]):
        layer = {f"{n}.weight": (hidden,) for n in norms}
        layer |= {f"self_attn.{n}_proj.weight": (w, hidden) for n, w in (("q", q), ("k", kv), ("v", kv))}
        layer |= {"self_attn.o_proj.weight": (hidden, q), "mlp.down_proj.weight": (hidden, inner)}
        layer |= {f"mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        if family == "qwen2":
            layer |= {f"self_attn.{n}_proj.bias": (w,) for n, w in (("q", q), ("k", kv), ("v", kv))}
        if family in ("qwen3", "gemma3_text"):
            layer |= {f"self_attn.{n}_norm.weight": (dim,) for n in "qk"}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"model.{name}": _random(name, shape, seed) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name and not gemma:  # Gemma stores w − 1
            tensors[name] += 1
    if config["tie_word_embeddings"]:
        head = tensors["model.embed_tokens.weight"]
    else:
        head = tensors["lm_head.weight"] = _random("lm_head", (VOCAB_SIZE, hidden), seed)
    head *= 3
    printable = np.zeros(VOCAB_SIZE, bool)
    printable[32:127] = True
    head[~printable] /= 8
    return tensors


def _random(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Uniform, variance about 1 / fan-in; only integer and power-of-two arithmetic, so no machine rounds otherwise."""
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(math.prod(shape))
    uniform = (raw >> np.uint64(41)).astype(np.float32) * 2.0**-22 - 1  # [−1, 1)
    scale = 0.25 if len(shape) == 1 else 2.0 ** round(math.log2(math.sqrt(3 / shape[1])))
    return (uniform * np.float32(scale)).astype(np.float32).reshape(shape)
