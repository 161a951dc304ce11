"""Loading streams: peak host memory grows by at most 1.3 times the parameters' size, whatever the format."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from jaxdet.checkpoints import demo, open_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")

LIMIT = 1.3
LAYERS, HIDDEN, INNER, VOCAB, HEADS = 8, 1024, 4096, 16384, 16
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
MATRICES = {
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN),
    "self_attn.k_proj": ("attn_k", HIDDEN, HIDDEN),
    "self_attn.v_proj": ("attn_v", HIDDEN, HIDDEN),
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", INNER, HIDDEN),
    "mlp.up_proj": ("ffn_up", INNER, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, INNER),
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

MEASURE = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.models.registry import build_model

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

jax.block_until_ready(jnp.zeros(4) + 1)  # the CPU client itself
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts from here
before = status("VmRSS")
if sys.argv[3] == "LLM":
    llm = LLM(sys.argv[1], dtype=sys.argv[2], max_num_seqs=1, max_model_len=128, num_pages=2)
    state = llm.engine.step_fn.state
else:
    checkpoint = open_checkpoint(sys.argv[1])
    held = [checkpoint.read(name) for name in checkpoint.tensors] if sys.argv[3] == "hold" else []
    state = nnx.state(
        build_model(
            checkpoint, checkpoint.config, dtype=jnp.dtype(sys.argv[2]), backend="xla", max_model_len=128
        ),
        nnx.Param,
    )
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(state)))
print(size, status("VmHWM") - before)
"""


def weights():
    """Names in both formats, and one tensor at a time: 335 MB in 16 bits."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return (rng.random(shape, np.float32) - np.float32(0.5)).astype(np.float16)

    yield "model.embed_tokens.weight", "token_embd.weight", random(VOCAB, HIDDEN)
    yield "lm_head.weight", "output.weight", random(VOCAB, HIDDEN)
    yield "model.norm.weight", "output_norm.weight", random(HIDDEN)
    for i in range(LAYERS):
        for hf, (ggml, *shape) in MATRICES.items():
            yield f"model.layers.{i}.{hf}.weight", f"blk.{i}.{ggml}.weight", random(*shape)
        for hf, ggml in NORMS.items():
            yield f"model.layers.{i}.{hf}.weight", f"blk.{i}.{ggml}.weight", random(HIDDEN)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("big") / "model"
    path.mkdir()
    save_file({hf: value for hf, _, value in weights()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    Tokenizer(models.BPE({"a": 0}, [])).save(str(path / "tokenizer.json"))
    return path


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    for _, name, value in weights():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(source: Path | str, dtype: str, how: str = "model") -> float:
    """Peak growth of the resident set over the parameters' size, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), dtype, how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    size, growth = map(int, done.stdout.split())
    assert growth >= size, "the parameters themselves must show"
    return growth / size


def test_safetensors(folder: Path):
    assert measure(folder, "bfloat16") <= LIMIT


def test_the_measure_notices_a_loader_that_holds_all(folder: Path):
    """Negative control."""
    assert measure(folder, "bfloat16", "hold") > LIMIT


@pytest.mark.slow
def test_safetensors_into_a_wider_dtype(folder: Path):
    assert measure(folder, "float32") <= LIMIT


@pytest.mark.slow
def test_gguf(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf")
    assert measure(tmp_path / "model.gguf", "bfloat16") <= LIMIT


@pytest.mark.slow
def test_orbax(folder: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "orbax", open_checkpoint(folder), format="orbax", progress=False)
    assert measure(tmp_path / "orbax", "bfloat16") <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "how"), [("bfloat16", "model"), ("float32", "LLM")])
def test_the_demo_model(dtype: str, how: str):
    """In float32 the whole `LLM`: tokenizer, digest, compiler and a cache of two pages included."""
    assert measure(demo.NAME, dtype, how) <= LIMIT
