"""Writes GGUF files the way llama.cpp's converters do, from Hugging Face folders."""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
VOCABULARY = ["a", "b", "ab", *(f"<{i}>" for i in range(285))]


def permute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves interleaved, as converters store Llama's q and k."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.swapaxes(1, 2).reshape(value.shape)


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What converters compute for Llama 3's rope scaling: one divisor per frequency."""
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return (1 / ((1 - smooth.clip(0, 1)) / factor + smooth.clip(0, 1))).astype(np.float32)


def save(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Byte-level BPE with one merge."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(VOCABULARY))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def convert(folder: Path, path: Path, *, raw_rows: bool = False, without: str = "", change=None) -> Path:
    """The model in `folder` as float32 GGUF.

    Args:
        raw_rows: leave Llama's q and k rows unpermuted, as a wrong converter would.
        without: leave this GGUF tensor out.
        change: takes a GGUF name and value, returns the value to write.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    heads, kv_heads, layers = (
        config[k] for k in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    )
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    add_vocabulary(writer)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, value in load_file(folder / "model.safetensors").items():
        value = value.astype(np.float32)
        if arch == gguf.MODEL_ARCH.LLAMA and not raw_rows and ("q_proj" in name or "k_proj" in name):
            value = permute(value, heads if "q_proj" in name else kv_heads)
        if arch == gguf.MODEL_ARCH.GEMMA3 and name.endswith("norm.weight"):
            value = value + np.float32(1)
        ggml = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ggml != without:
            writer.add_tensor(ggml, np.ascontiguousarray(change(ggml, value) if change else value))
    save(writer)
    return path
