"""GGUF files: every quantisation, every architecture against its Hugging Face folder, and damage of many kinds."""

import json
import random
import shutil
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import add_vocabulary, convert, permute, save
from test_models_reference import logits_of

from jaxdet.checkpoints import gguf_reader, open_checkpoint, save_checkpoint
from jaxdet.checkpoints.gguf import QUANTISATIONS
from jaxdet.models.registry import build_model, family_of

ROWS, COLUMNS = 24, 512
K_BLOCKS = {"Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
"""Bytes of a block of 256, and where its float16 scales are."""
ERROR = {
    "F32": 0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q4_0": 0.14,
    "Q4_1": 0.07,
    "Q5_0": 0.07,
    "Q5_1": 0.04,
    "Q8_0": 0.005,
}
"""Largest error of a quantisation over values in [-1, 1]."""


def quantised(kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks as they lie in a file."""
    if kind.name not in K_BLOCKS:
        return gguf.quantize(rng.uniform(-1, 1, (ROWS, COLUMNS)).astype(np.float32), kind)
    size, scales = K_BLOCKS[kind.name]
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // 256, size), np.uint8)
    for at in scales:
        scale = rng.uniform(0.01, 0.1, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def one_matrix(path: Path, blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", blocks, raw_dtype=kind)
    save(writer)
    return path


DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_quantisation(tmp_path: Path, monkeypatch, name: str):
    kind = gguf.GGMLQuantizationType[name]
    blocks = quantised(kind, np.random.default_rng(0))
    path = one_matrix(tmp_path / "model.gguf", blocks, kind)
    monkeypatch.setattr(gguf_reader, "BLOCK_BYTES", 5 * COLUMNS * 4)  # several steps, the last one shorter
    found = open_checkpoint(path).read(DOWN)
    assert (found.shape, found.dtype) == ((ROWS, COLUMNS), np.float32)
    assert found.tobytes() == gguf.dequantize(blocks, kind).tobytes()
    if name in ERROR:
        exact = np.random.default_rng(0).uniform(-1, 1, (ROWS, COLUMNS)).astype(np.float32)
        assert np.abs(found - exact).max() <= ERROR[name]
    else:
        assert np.isfinite(found).all()
        assert np.unique(found).size > 1000
    blocks = blocks.copy()
    blocks.view(np.uint8)[-1, 100] ^= 0x11  # negative control: one byte shows
    other = open_checkpoint(one_matrix(tmp_path / "other.gguf", blocks, kind)).read(DOWN)
    assert other.tobytes() != found.tobytes()


def weights_and_shape(path: Path):
    """Every parameter's bits, rope tables included, and the model's shape."""
    checkpoint = open_checkpoint(path)
    model = build_model(checkpoint, checkpoint.config, dtype=jnp.float32, backend="xla", max_model_len=128)
    leaves = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model))]
    return [(x.shape, x.tobytes()) for x in leaves], model.config


def amended(source: Path, target: Path, **config) -> Path:
    shutil.copytree(source, target)
    old = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(old | config))
    return target


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
# GGUF has no field for these two: llama.cpp takes every sixth layer as global and 1/√head_dim as the scale.
GEMMA = {"layer_types": None, "query_pre_attn_scalar": 32}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", LINEAR),
        ("mistral", {}),
        ("mistral_window", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3_text", GEMMA),
    ],
    ids=["llama", "llama-linear", "mistral", "mistral_window", "qwen2", "qwen3", "gemma3"],
)
def test_architecture_equals_its_folder(references: Path, tmp_path: Path, family: str, config: dict):
    folder = amended(references / family, tmp_path / "model", **config)
    expected, expected_shape = weights_and_shape(folder)
    found, shape = weights_and_shape(convert(folder, tmp_path / "model.gguf"))
    assert found == expected
    for field in ("num_q_heads", "num_kv_heads", "head_dim", "windows", "rope_of_layer", "tied_embeddings"):
        assert getattr(shape, field) == getattr(expected_shape, field)
    for field in ("attention_scale", "activation", "qkv_bias", "output_bias", "max_position", "soft_cap"):
        assert getattr(shape, field) == getattr(expected_shape, field)
    assert np.float32(shape.norm_eps) == np.float32(expected_shape.norm_eps)


def test_llama3_rope_factors(references: Path, tmp_path: Path):
    """Converters store the factors in float32: the frequencies agree to that."""
    path = convert(references / "llama_rope_scaling", tmp_path / "model.gguf")
    assert open_checkpoint(path).config["rope_scaling"]["rope_type"] == "factors"
    with np.load(references / "llama_rope_scaling" / "reference.npz") as saved:
        exact, ids = saved["logits_float64"], saved["ids"]
    error = np.abs(logits_of(path, ids, jnp.float32) - exact).max() / np.abs(exact).max()
    assert error <= 1e-5


def test_logits_have_the_folders_bits_and_raw_rows_are_noticed(references: Path, tmp_path: Path):
    with np.load(references / "llama" / "reference.npz") as saved:
        ids = saved["ids"]
    folder = references / "llama"
    expected = logits_of(folder, ids, jnp.float32)
    found = logits_of(convert(folder, tmp_path / "model.gguf"), ids, jnp.float32)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    raw = logits_of(convert(folder, tmp_path / "raw.gguf", raw_rows=True), ids, jnp.float32)
    assert np.abs(raw - expected).max() / np.abs(expected).max() > 0.01


def llama3(factor: float, original: int = 8192, high: float = 4.0) -> dict:
    scaling = {"factor": factor, "original_max_position_embeddings": original, "high_freq_factor": high}
    return {"rope_parameters": scaling | {"rope_type": "llama3", "rope_theta": 5e5, "low_freq_factor": 1.0}}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_parameters_are_recovered(references: Path, tmp_path: Path, factor: float):
    """What config.json then states is what other programs read too, and the folder's own model to the bit."""
    folder = amended(references / "llama", tmp_path / "model", **llama3(factor))
    path = convert(folder, tmp_path / "model.gguf")
    save_checkpoint(tmp_path / "copy", open_checkpoint(path), format="safetensors", progress=False)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == llama3(factor)["rope_parameters"]
    expected = weights_and_shape(folder)[0]
    assert weights_and_shape(path)[0] == weights_and_shape(tmp_path / "copy")[0] == expected
    other = amended(references / "llama", tmp_path / "other", **llama3(factor + 1))
    assert weights_and_shape(other)[0] != expected  # negative control


@pytest.mark.parametrize("change", [llama3(9.0), llama3(8.0, 8193), llama3(8.0, high=4.001)], ids=str)
def test_other_rope_factors_are_no_safetensors_folder(references: Path, tmp_path: Path, change: dict):
    folder = amended(references / "llama", tmp_path / "model", **change)
    source = open_checkpoint(convert(folder, tmp_path / "strange.gguf"))
    with pytest.raises(ValueError, match=r"^strange has rope factors .*; convert it to orbax$"):
        save_checkpoint(tmp_path / "copy", source, format="safetensors", progress=False)
    assert not (tmp_path / "copy").exists()
    save_checkpoint(tmp_path / "copy", source, format="orbax", progress=False)
    assert weights_and_shape(tmp_path / "copy") == weights_and_shape(tmp_path / "strange.gguf")


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_conversion_keeps_the_model(references: Path, tmp_path: Path, family: str, format: str):
    """Weights, shape, tokenizer and template."""
    source = open_checkpoint(convert(references / family, tmp_path / "model.gguf"))
    save_checkpoint(tmp_path / "copy", source, format=format, progress=False)
    assert weights_and_shape(tmp_path / "copy") == weights_and_shape(tmp_path / "model.gguf")
    old, new = source.tokenizer(), open_checkpoint(tmp_path / "copy").tokenizer()
    assert new.encode("abab") == old.encode("abab") == [2, 2]
    assert (new.bos_token_id, new.eos_token_ids) == (old.bos_token_id, old.eos_token_ids) == (1, (2,))


def test_permuted_rows_come_back():
    """The permutation is no no-op on these shapes, so that the tests above can fail."""
    rows = np.arange(16.0).reshape(16, 1)
    assert permute(rows, 2)[:4, 0].tolist() == [0, 4, 1, 5]


@pytest.fixture
def path(references: Path, tmp_path: Path) -> Path:
    return convert(references / "qwen3", tmp_path / "model.gguf")


def load(path: Path) -> None:
    """Everything that a user's first call reads."""
    checkpoint = open_checkpoint(path)
    checkpoint.tokenizer()
    family_of(checkpoint.config).read_config(checkpoint.config)
    build_model(checkpoint, checkpoint.config, dtype=jnp.float32, backend="xla", max_model_len=128)


def refusal(path: Path) -> str | None:
    """The one-line ValueError that loading raises, if it does; any other exception fails the test."""
    try:
        load(path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) > 20
        return str(error)
    return None


def data_start(path: Path) -> int:
    return gguf.GGUFReader(path).data_offset


@pytest.mark.timeout(120)
def test_cut_short_anywhere(path: Path):
    whole = path.read_bytes()
    header = data_start(path)
    cuts = {*range(0, 40, 3), *range(40, header, header // 30), *range(header, len(whole), len(whole) // 12)}
    for cut in sorted(cuts | {len(whole) - 1}):
        path.write_bytes(whole[:cut])
        assert "fetch it again" in (refusal(path) or ""), f"cut at {cut} of {len(whole)}"
    path.write_bytes(whole)
    assert refusal(path) is None


@pytest.mark.timeout(300)
def test_flipped_bytes_in_the_header(path: Path):
    """Whatever can't be noticed loads; what is noticed is one line."""
    whole, header = path.read_bytes(), data_start(path)
    rng = random.Random(0)
    noticed = 0
    places = [*range(24), *(rng.randrange(24, header) for _ in range(120))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= rng.choice((1, 0x80, 0xFF))
        path.write_bytes(flipped)
        noticed += refusal(path) is not None
    assert noticed > len(places) // 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "element", [gguf.GGUFValueType.UINT8, gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY]
)
def test_an_array_longer_than_the_file(tmp_path: Path, element):
    """The gguf package's own reader would count to 2^60 here."""
    head = struct.pack("<IIQQ", 0x46554747, 3, 0, 1)
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, element, 2**60)
    path = tmp_path / "model.gguf"
    path.write_bytes(head + entry + bytes(64))
    assert "damaged or cut short" in (refusal(path) or "")


def test_overlapping_tensors(path: Path):
    offsets = [int(t.field.parts[-1][0]) for t in gguf.GGUFReader(path).tensors]
    whole = path.read_bytes()
    needle = struct.pack("<Q", offsets[3])
    at = whole.index(needle, whole.index(b"blk.0."))
    path.write_bytes(whole[:at] + struct.pack("<Q", offsets[2]) + whole[at + 8 :])
    assert "damaged" in (refusal(path) or "")


def test_bad_models_are_named(references: Path, tmp_path: Path):
    folder = references / "qwen3"
    missing = convert(folder, tmp_path / "a.gguf", without="blk.1.attn_k_norm.weight")
    assert "'model.layers.1.self_attn.k_norm.weight'" in (refusal(missing) or "")
    embedding = convert(folder, tmp_path / "b.gguf", without="token_embd.weight")
    assert "token_embd.weight" in (refusal(embedding) or "")

    def spoil(name, value):
        if name == "blk.0.ffn_up.weight":
            value[3, 5] = np.nan
        return value

    assert "up_proj.weight holds NaN" in (refusal(convert(folder, tmp_path / "c.gguf", change=spoil)) or "")

    def reshape(name, value):
        return value[:-1] if name == "blk.0.ffn_up.weight" else value

    wrong = refusal(convert(folder, tmp_path / "d.gguf", change=reshape)) or ""
    assert "up_proj.weight has shape (95, 64) but the config asks for (96, 64)" in wrong


def test_unsupported_kinds_are_named(tmp_path: Path):
    blocks = np.zeros((ROWS, COLUMNS // 256 * 84), np.uint8)
    path = one_matrix(tmp_path / "model.gguf", blocks, gguf.GGMLQuantizationType.Q2_K)
    assert "quantised as Q2_K" in (refusal(path) or "")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    add_vocabulary(writer)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    save(writer)
    assert "architecture 'mamba'" in (refusal(tmp_path / "mamba.gguf") or "")
    path = one_matrix(tmp_path / "none.gguf", np.zeros((8, 8), np.float32), gguf.GGMLQuantizationType.F32)
    assert "holds no tokenizer" in (refusal(path) or "")
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    save(writer)
    assert "is no GGUF file" in (refusal(tmp_path / "big.gguf") or "")


def test_unsupported_rope_and_tokenizer_are_named(path: Path):
    whole = path.read_bytes()
    at = whole.index(b"gpt2")
    path.write_bytes(whole[:at] + b"bert" + whole[at + 4 :])
    assert "tokenizer 'bert'" in (refusal(path) or "")
