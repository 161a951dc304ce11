"""GGUF files, dequantised with the `gguf` package and translated to Hugging Face names, layouts and config."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxdet.checkpoints.base import Checkpoint, TensorInfo
from jaxdet.checkpoints.gguf_reader import GGUFFile
from jaxdet.checkpoints.gguf_tokenizer import read_tokenizer
from jaxdet.tokenizer import Tokenizer

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
QUANTISATIONS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and of 3.2."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFCheckpoint(Checkpoint):
    """One .gguf file.

    Raises:
        ValueError: the file is damaged or cut short, or its architecture or a quantisation is not supported (named).
    """

    def __init__(self, path: Path, name: str | None = None):
        self.path, self.name = path, name or path.stem
        self._file = GGUFFile(path)
        self._architecture = str(self._file.fields.get("general.architecture"))
        if self._architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self._architecture!r} in {path.name} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        self._gguf_name: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for tensor in self._file.tensors.values():
            if tensor.tensor_type.name not in QUANTISATIONS:
                raise ValueError(
                    f"{tensor.name} in {path.name} is quantised as {tensor.tensor_type.name}, which is not "
                    f"supported; supported: {', '.join(QUANTISATIONS)}"
                )
            if (hf := self._translate(tensor.name)) is not None:
                self._gguf_name[hf] = tensor.name
                shape = tuple(int(n) for n in reversed(tensor.shape))
                self.tensors[hf] = TensorInfo(shape, np.dtype(np.float32))
        self.config = self._read_config()

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self._file.fields, self.path.name)

    def _translate(self, name: str) -> str | None:
        stem, _, kind = name.rpartition(".")
        if stem in TOP:
            return f"{TOP[stem]}.{kind}"
        block = GEMMA_BLOCK if self._architecture == "gemma3" else BLOCK
        match stem.split("."):
            case ["blk", layer, part] if part in block:
                return f"model.layers.{layer}.{block[part]}.{kind}"
        return None  # rope_freqs: read by the config

    def _read(self, name: str) -> np.ndarray:
        value = self._file.dequantise(self._gguf_name[name])
        if self._architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = self.config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            value = _unpermute(value, heads)
        if self._architecture == "gemma3" and "norm" in name:
            value -= np.float32(1)  # GGUF stores 1 + w
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        """A positive integer of the metadata."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self._architecture}.{key} in {self.path} is {value!r}; fetch the file again")
        return value

    def _get(self, key: str, default: Any = None) -> Any:
        return self._file.fields.get(f"{self._architecture}.{key}", default)

    def _read_config(self) -> dict[str, Any]:
        if "model.embed_tokens.weight" not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor token_embd.weight; fetch it again")
        heads, hidden = self._count("attention.head_count"), self._count("embedding_length")
        head_dim = self._count("attention.key_length", hidden // heads)
        ids = {k: self._file.fields.get(f"tokenizer.ggml.{k}") for k in ("bos_token_id", "eos_token_id")}
        config = {
            "model_type": ARCHITECTURES[self._architecture],
            "hidden_size": hidden,
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._count("feed_forward_length"),
            "rms_norm_eps": self._get("attention.layer_norm_rms_epsilon", 1e-6),
            "vocab_size": self.tensors["model.embed_tokens.weight"].shape[0],
            "max_position_embeddings": self._count("context_length", 2048),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "rope_theta": self._get("rope.freq_base", 10000.0),
            "torch_dtype": "float32",
            **{k: v for k, v in ids.items() if v is not None},
        }
        config |= self._rope_scaling(head_dim)
        if self._get("attention.sliding_window") is not None:
            config["sliding_window"] = self._count("attention.sliding_window")
            if self._architecture == "llama":  # Mistral, whose GGUF files say llama
                config["model_type"] = "mistral"
        if self._architecture == "gemma3":
            config["query_pre_attn_scalar"] = head_dim if hidden != 5376 else hidden // heads
        return config

    def _rope_scaling(self, head_dim: int) -> dict[str, Any]:
        """Linear scaling from the metadata; Llama 3's from the factors that converters store as a tensor.

        Factors that are not Llama 3's stay as they are, in a `rope_type` of our own.
        """
        if ROPE_FACTORS in self._file.tensors:
            factors = self._file.dequantise(ROPE_FACTORS)
            if factors.shape != (head_dim // 2,) or not (np.isfinite(factors) & (factors > 0)).all():
                raise ValueError(f"{ROPE_FACTORS} in {self.path} is damaged; fetch the file again")
            known = _llama3_scaling(factors, self._get("rope.freq_base", 10000.0))
            return {"rope_scaling": known or {"rope_type": "factors", "factors": factors.tolist()}}
        kind = self._get("rope.scaling.type", "none")
        if kind == "none":
            return {}
        return {"rope_scaling": {"rope_type": kind, "factor": self._get("rope.scaling.factor", 1.0)}}


def _llama3_scaling(factors: np.ndarray, theta: Any) -> dict[str, Any] | None:
    """The parameters of Llama 3.1 or 3.2, if the stored float32 factors are what these give."""
    if type(theta) is not float or not 0 < theta < np.inf:
        return None
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    for factor in LLAMA3_FACTORS:
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        smooth = (LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low)
        smooth = smooth.clip(0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-6, atol=0):
            return scaling
    return None


def _unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each rotary head; Hugging Face keeps them apart."""
    pairs = value.shape[0] // heads // 2
    return value.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(value.shape)
