"""Hugging Face folders, Orbax directories and the conversion between them."""

import json
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers

from jaxdet.checkpoints import open_checkpoint, save_checkpoint
from jaxdet.checkpoints.hf import INDEX, HFCheckpoint
from jaxdet.checkpoints.orbax import ARRAYS, OrbaxCheckpoint

CONFIG = {"model_type": "llama", "hidden_size": 8, "eos_token_id": 2}
NAMES = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((12, 8), (8, 8), (8,))
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16)
    return {
        n: rng.standard_normal(s).astype(np.dtype(d)) for n, s, d in zip(NAMES, shapes, dtypes, strict=True)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two safetensors shards with an index."""
    path = tmp_path / "model"
    path.mkdir()
    tensors = weights()
    place = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(NAMES)}
    for file in set(place.values()):
        save_file({n: tensors[n] for n in NAMES if place[n] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": place}))
    (path / "config.json").write_text(json.dumps(CONFIG))
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": "{{ messages[0].content }}"})
    )
    return path


def assert_same_tensors(checkpoint, expected: dict[str, np.ndarray]) -> None:
    assert set(checkpoint.tensors) == set(expected)
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert checkpoint.tensors[name] == type(checkpoint.tensors[name])(value.shape, value.dtype)
        assert read.tobytes() == value.tobytes()


def test_sharded_safetensors(folder: Path):
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint, HFCheckpoint)
    assert checkpoint.config == CONFIG
    assert_same_tensors(checkpoint, weights())
    assert checkpoint.tokenizer().encode("a b") == [0, 1]


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_save_keeps_every_bit_and_stands_alone(folder: Path, tmp_path: Path, format: str):
    source = open_checkpoint(folder)
    target = tmp_path / "new" / "copy"
    save_checkpoint(target, source, format=format, progress=False)
    for file in folder.iterdir():  # the copy may not lean on its source
        file.unlink()
    copy = open_checkpoint(target)
    assert isinstance(copy, OrbaxCheckpoint) == (format == "orbax")
    assert_same_tensors(copy, weights())
    assert copy.config == CONFIG
    tokenizer = copy.tokenizer()
    assert (tokenizer.encode("b a"), tokenizer.eos_token_ids) == ([1, 0], (2,))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_save_in_another_dtype(folder: Path, tmp_path: Path, format: str):
    save_checkpoint(
        tmp_path / "half", open_checkpoint(folder), format=format, dtype="bfloat16", progress=False
    )
    half = open_checkpoint(tmp_path / "half")
    assert half.config["torch_dtype"] == "bfloat16"
    assert_same_tensors(half, {n: v.astype(ml_dtypes.bfloat16) for n, v in weights().items()})


def test_digest_is_of_the_contents(folder: Path, tmp_path: Path):
    source = open_checkpoint(folder)
    save_checkpoint(tmp_path / "orbax", source, format="orbax", progress=False)
    assert open_checkpoint(tmp_path / "orbax").digest() == source.digest()
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert open_checkpoint(folder).digest() != source_digest(weights())


def source_digest(tensors: dict[str, np.ndarray]) -> str:
    import hashlib

    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}/{tensors[name].dtype}/{tensors[name].shape}/".encode())
        total.update(tensors[name].tobytes())
    return total.hexdigest()


def test_orbax_restores_into_shardings(folder: Path, tmp_path: Path):
    save_checkpoint(tmp_path / "orbax", open_checkpoint(folder), format="orbax", progress=False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", None))
    checkpoint = open_checkpoint(tmp_path / "orbax")
    assert isinstance(checkpoint, OrbaxCheckpoint)
    restored = checkpoint.restore_sharded({NAMES[0]: sharding})
    assert restored[NAMES[0]].sharding == sharding
    assert np.asarray(restored[NAMES[0]]).tobytes() == weights()[NAMES[0]].tobytes()


class FailsHalfway:
    """A checkpoint whose second tensor can't be read."""

    def __init__(self, source):
        self.name, self.config, self.tensors = source.name, source.config, source.tensors
        self._source, self.tokenizer = source, source.tokenizer

    def read(self, name: str) -> np.ndarray:
        if name == sorted(self.tensors)[1]:
            raise OSError("disk gone")
        return self._source.read(name)


@pytest.mark.parametrize("format", ["safetensors", "orbax"])
def test_nothing_half_written_stays(folder: Path, tmp_path: Path, format: str):
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk gone"):
        save_checkpoint(
            tmp_path / "copy", FailsHalfway(open_checkpoint(folder)), format=format, progress=False
        )
    assert set(tmp_path.iterdir()) == before


def test_an_existing_target_is_refused(folder: Path):
    with pytest.raises(FileExistsError, match="choose another name"):
        save_checkpoint(folder, open_checkpoint(folder), format="orbax", progress=False)


def refused(path: Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [4, 40, -1])
def test_truncated_safetensors(folder: Path, keep: int):
    shard = folder / "model-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, "model-0.safetensors is damaged or incomplete")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"not json",
        b'{"a":{"dtype":"F32","shape":[2]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}',
        b'{"a":{"dtype":"F32","shape":["x"],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}',
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    ],
)
def test_corrupt_safetensors_header(folder: Path, header: bytes):
    (folder / "model-0.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(folder, "model-0.safetensors is damaged or incomplete")


def test_unsupported_dtype_is_named(folder: Path):
    save_file({"a": np.zeros(4, np.int8)}, folder / "model-0.safetensors")
    refused(folder, "a has dtype I8")


def test_missing_pieces_are_named(folder: Path):
    with pytest.raises(ValueError, match=r"no tensor 'lm_head\.weight'"):
        open_checkpoint(folder).read("lm_head.weight")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "model-0.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "lacks the tensor 'lm_head.weight'")
    (folder / "model-1.safetensors").unlink()
    refused(folder, "model-1.safetensors is missing")


def test_folders_that_are_no_models(folder: Path, tmp_path: Path):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is missing or damaged"):
        open_checkpoint(folder).tokenizer()
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is no valid JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path / "pickled", "never pickled")
    refused(tmp_path / "pickled" / "pytorch_model.bin", "is a .bin file")
    refused(tmp_path / "absent" / "model", "no model", FileNotFoundError)


def test_damaged_orbax(folder: Path, tmp_path: Path):
    target = tmp_path / "orbax"
    save_checkpoint(target, open_checkpoint(folder), format="orbax", progress=False)
    damaged = target / ARRAYS / NAMES[0]
    for file in damaged.rglob("*"):
        if file.is_file() and file.name != "_METADATA":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"tensor '{NAMES[0]}' is damaged") as caught:
        open_checkpoint(target).read(NAMES[0])
    assert "\n" not in str(caught.value)
    (damaged / "_METADATA").unlink()
    refused(target, f"lacks the tensor '{NAMES[0]}'")
    (target / "config.json").unlink()
    refused(target, "lacks config.json")
