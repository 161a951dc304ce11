"""Makes the reference logits beside this file with transformers on torch, independently of jaxdet.

Made with Python 3.11, torch 2.13 (CPU), transformers 5.23, tokenizers, safetensors and gguf:

    python tests/references/make_references.py families
    python tests/references/make_references.py smollm2 path/to/SmolLM2-135M-Instruct.Q4_1.gguf

README.md says what the files hold.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
SEQUENCES, LENGTH = 2, 48

COMMON = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


FAMILIES = {
    "llama": ("llama", {"rope_parameters": rope(10000.0)}),
    "llama_rope_scaling": ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "qwen2": (
        "qwen2",
        {"rope_parameters": rope(1e6), "tie_word_embeddings": True, "use_sliding_window": False},
    ),
    "qwen3": ("qwen3", {"rope_parameters": rope(1e6), "head_dim": 32, "use_sliding_window": False}),
    "mistral": ("mistral", {"rope_parameters": rope(1e4), "sliding_window": None, "head_dim": 16}),
    "mistral_window": ("mistral", {"rope_parameters": rope(1e4), "sliding_window": 20, "head_dim": 16}),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": rope(1e4), "full_attention": rope(1e6)},
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
}


@contextlib.contextmanager
def float64_everywhere():
    """transformers raises norms, softmax and rotary angles "to float32": here that name means float64."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved
        torch.set_default_dtype(torch.float32)


def build(config, dtype: torch.dtype):
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    """[batch, tokens, vocab]."""
    return model(input_ids=torch.as_tensor(ids), use_cache=False).logits


def randomise(model, generator: torch.Generator) -> None:
    """Norm weights and biases too: their defaults of one and zero would hide mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def make_family(name: str, model_type: str, extra: dict) -> None:
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(model_type, **{**COMMON, **extra})
    model = build(config, torch.float32)
    generator = torch.Generator().manual_seed(1)
    randomise(model, generator)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ids = torch.randint(3, config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    with float64_everywhere():
        wide = build(config, torch.float64)
        wide.load_state_dict(weights, strict=False)
        exact = logits(wide, ids)
    narrow = build(config, torch.float32)
    narrow.load_state_dict(weights, strict=False)
    narrow = narrow.to(torch.bfloat16)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"architectures": [type(model).__name__], "dtype": "float32"}
    text = json.dumps(written, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    single = logits(model, ids)
    assert exact.dtype == torch.float64
    np.savez_compressed(
        folder / "reference.npz",
        ids=ids.numpy().astype(np.int32),
        logits_float32=single.numpy(),
        logits_float64=exact.numpy(),
        logits_bfloat16=logits(narrow, ids).float().numpy(),
    )
    error = (single.double() - exact).abs().max() / exact.abs().max()
    size = (folder / "model.safetensors").stat().st_size
    print(f"{name}: float32 against float64 {error:.1e}, largest logit {exact.abs().max():.1f}, {size} bytes")


def make_families() -> None:
    for name, (model_type, extra) in FAMILIES.items():
        make_family(name, model_type, extra)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if sys.argv[1] == "families":
        make_families()
    else:
        from smollm2_reference import make_smollm2

        make_smollm2(Path(sys.argv[2]), HERE / "smollm2")
