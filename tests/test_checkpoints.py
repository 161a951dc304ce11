"""Hugging Face folders, Orbax directories and the conversion between them."""

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers

from jaxdet.cast import CHECKED_AT_ONCE, cast
from jaxdet.checkpoints import open_checkpoint, save_checkpoint
from jaxdet.checkpoints.hf import INDEX, HFCheckpoint
from jaxdet.checkpoints.orbax import ARRAYS, MANIFEST, OrbaxCheckpoint
from jaxdet.models.registry import build_model, family_of

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


def test_dtype_is_stated_under_both_names(folder: Path, tmp_path: Path):
    """transformers 5 reads one, earlier ones the other; a stale one would undo the conversion."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"dtype": "float32"}))
    source = open_checkpoint(folder)
    save_checkpoint(tmp_path / "half", source, format="orbax", dtype="bfloat16", progress=False)
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def single(folder: Path, **tensors: np.ndarray):
    """The folder's model with these tensors instead."""
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_float64(folder: Path, tmp_path: Path):
    """safetensors keep it; JAX, so Orbax, reads float32."""
    value = np.random.default_rng(0).standard_normal((5, 3))
    source = single(folder, a=value)
    save_checkpoint(tmp_path / "safe", source, format="safetensors", progress=False)
    assert_same_tensors(open_checkpoint(tmp_path / "safe"), {"a": value})
    save_checkpoint(tmp_path / "orbax", source, format="orbax", progress=False)
    assert_same_tensors(open_checkpoint(tmp_path / "orbax"), {"a": value.astype(np.float32)})


@pytest.mark.parametrize(
    ("source", "dtype", "remedy"),
    [
        (np.float32, "float16", "use bfloat16 or float32"),
        (ml_dtypes.bfloat16, "float16", "use bfloat16 or float32"),
        (np.float32, "bfloat16", "use float32"),
        (np.float64, "float32", "fetch the model again"),
        (np.float64, None, "fetch the model again"),
    ],
)
def test_overflow_of_a_conversion_is_named(folder: Path, tmp_path: Path, source, dtype, remedy: str):
    value = np.ones((3, 2), source)
    value[1, 1] = -ml_dtypes.finfo(source).max
    match = f"^tensor a holds values too large for {dtype or 'float32'}; {remedy}$"
    with pytest.raises(ValueError, match=match):
        save_checkpoint(
            tmp_path / "copy", single(folder, a=value), format="orbax", dtype=dtype, progress=False
        )
    assert not (tmp_path / "copy").exists()
    value[1, 1] = 1e4 / 3
    save_checkpoint(tmp_path / "copy", single(folder, a=value), format="orbax", dtype=dtype, progress=False)
    assert_same_tensors(open_checkpoint(tmp_path / "copy"), {"a": value.astype(np.dtype(dtype or "float32"))})


def test_overflow_far_into_a_tensor():
    value = np.zeros(CHECKED_AT_ONCE + 5, np.float32)
    assert not cast("a", value, np.float16).any()
    value[-1] = 65520  # rounds up to inf; anything below rounds to 65504
    with pytest.raises(ValueError, match="tensor a holds values too large for float16"):
        cast("a", value, np.float16)
    value[-1] = np.nextafter(np.float32(65520), np.float32(0))
    assert cast("a", value, np.float16)[-1] == 65504


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
)
def test_overflow_of_a_model_is_named(references: Path, tmp_path: Path, name: str):
    path = tmp_path / "model"
    shutil.copytree(references / "llama", path)
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensors[name].astype(np.float32)
    tensors[name][3, 5] = 1e5
    save_file(tensors, path / "model.safetensors")
    build(path)
    build(path, jnp.bfloat16)
    with pytest.raises(
        ValueError, match=f"^tensor {name} holds values too large for float16; use bfloat16 or"
    ):
        build(path, jnp.float16)


def test_the_name_of_a_folder_given_as_a_dot(folder: Path, tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path / "orbax", open_checkpoint(folder), format="orbax", progress=False)
    for path in (folder, tmp_path / "orbax"):
        monkeypatch.chdir(path)
        assert open_checkpoint(".").name == path.name
        assert_same_tensors(open_checkpoint("."), weights())


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

    def __init__(self, source, error: BaseException):
        self.error = error
        self.name, self.config, self.tensors = source.name, source.config, source.tensors
        self._source, self.tokenizer = source, source.tokenizer

    def read(self, name: str) -> np.ndarray:
        if name == sorted(self.tensors)[1]:
            raise self.error
        return self._source.read(name)


FORMATS = pytest.mark.parametrize("format", ["safetensors", "orbax"])


@FORMATS
@pytest.mark.parametrize("error", [ValueError("tensor gone"), KeyboardInterrupt(), MemoryError()])
def test_nothing_half_written_stays(folder: Path, tmp_path: Path, format: str, error: BaseException):
    before = set(tmp_path.iterdir())
    with pytest.raises(type(error)):
        save_checkpoint(
            tmp_path / "copy", FailsHalfway(open_checkpoint(folder), error), format=format, progress=False
        )
    assert set(tmp_path.iterdir()) == before


@FORMATS
def test_a_disk_too_small_is_noticed_before_anything_is_written(folder, tmp_path, format, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"DST .* needs 0\.00 GB and 0\.00 GB are free; free some") as caught:
        save_checkpoint(tmp_path / "copy", open_checkpoint(folder), format=format, progress=False)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@FORMATS
def test_a_disk_that_fills_up(folder: Path, tmp_path: Path, format: str):
    """Files of this process may not grow past 64 kB: the third tensor does not fit."""
    rng = np.random.default_rng(0)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink()
    save_file({f"t{i}.weight": rng.random((100 * 4**i, 16)) for i in range(4)}, folder / "model.safetensors")
    code = (
        "import resource, signal, sys\n"
        "from jaxdet.checkpoints import open_checkpoint, save_checkpoint\n"
        "source = open_checkpoint(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "try:\n"
        "    save_checkpoint(sys.argv[2], source, format=sys.argv[3], progress=False)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    before = set(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "copy", format],
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("writing ") and line.endswith("free some disk space and run again"), done.stderr
    assert set(tmp_path.iterdir()) == before


def test_shards_and_their_index(folder: Path, tmp_path: Path, monkeypatch):
    """As `from_pretrained` wants them; a tensor larger than a shard gets one of its own."""
    source = open_checkpoint(folder)
    monkeypatch.setattr("jaxdet.checkpoints.save.SHARD_BYTES", 150)
    save_checkpoint(tmp_path / "copy", source, format="safetensors", progress=False)
    files = sorted(p.name for p in (tmp_path / "copy").glob("*.safetensors"))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "copy" / INDEX).read_text())
    assert index["weight_map"] == {NAMES[0]: files[0], NAMES[1]: files[1], NAMES[2]: files[1]}
    assert index["metadata"]["total_size"] == 12 * 8 * 4 + 8 * 8 * 2 + 8 * 2
    assert_same_tensors(open_checkpoint(tmp_path / "copy"), weights())


def test_bad_arguments_of_save(folder: Path, tmp_path: Path):
    source = open_checkpoint(folder)
    with pytest.raises(ValueError, match="format='pickle' is unknown; use safetensors or orbax"):
        save_checkpoint(tmp_path / "a", source, format="pickle")  # pyright: ignore
    with pytest.raises(ValueError, match="dtype='int3' is unknown; use one of float32, bfloat16, float16"):
        save_checkpoint(tmp_path / "a", source, format="orbax", dtype="int3")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be written .*; choose another place"):
        save_checkpoint(tmp_path / "file" / "a", source, format="orbax")


def test_an_existing_target_is_refused(folder: Path):
    with pytest.raises(FileExistsError, match="choose another name"):
        save_checkpoint(folder, open_checkpoint(folder), format="orbax", progress=False)


def refused(path: Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_safetensors_cut_short_anywhere(folder: Path):
    shard = folder / "model-0.safetensors"
    whole = shard.read_bytes()
    for cut in range(0, len(whole), 7):
        shard.write_bytes(whole[:cut])
        refused(folder, "model-0.safetensors is damaged or incomplete")
    shard.write_bytes(whole + b" ")
    refused(folder, "model-0.safetensors is damaged or incomplete")


def test_flipped_bytes_in_a_safetensors_header(folder: Path):
    """What can't be noticed loads as it stands; what is noticed is one line."""
    shard = folder / "model-0.safetensors"
    whole, rng, noticed = shard.read_bytes(), random.Random(0), 0
    (length,) = struct.unpack("<Q", whole[:8])
    for place in range(8 + length):
        flipped = bytearray(whole)
        flipped[place] ^= rng.choice((1, 0x80, 0xFF))
        shard.write_bytes(flipped)
        try:
            checkpoint = open_checkpoint(folder)
            assert all(checkpoint.read(name).shape == checkpoint.tensors[name].shape for name in NAMES)
        except ValueError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > length * 0.7


def test_a_file_that_changes_while_it_is_read(folder: Path):
    checkpoint = open_checkpoint(folder)
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:60])
    with pytest.raises(ValueError, match="changed while it was read; fetch it again"):
        checkpoint.read(NAMES[0])


@pytest.mark.parametrize(
    "index", ["[]", '{"weight_map": []}', '{"weight_map": {"a": "../../etc/passwd"}}', "{"]
)
def test_damaged_index(folder: Path, index: str):
    (folder / INDEX).write_text(index)
    refused(folder, f"{INDEX} (is damaged|holds no JSON object|is no valid JSON)")


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


def test_flipped_bytes_in_orbax(folder: Path, tmp_path: Path):
    """Every flip among the values is noticed; elsewhere it is, or changes nothing."""
    target = tmp_path / "orbax"
    save_checkpoint(target, open_checkpoint(folder), format="orbax", progress=False)
    expected, rng, noticed = weights()[NAMES[0]], random.Random(0), 0
    files = [f for f in (target / ARRAYS / NAMES[0]).rglob("*") if f.is_file() and f.stat().st_size]
    for file in (f for f in files for _ in range(6)):
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= rng.choice((1, 0x80, 0xFF))
        file.write_bytes(flipped)
        try:
            assert open_checkpoint(target).read(NAMES[0]).tobytes() == expected.tobytes()
        except ValueError as error:
            assert "\n" not in str(error)
            noticed += 1
        file.write_bytes(whole)
    assert noticed >= 12
    manifest = target / MANIFEST
    for text in (
        "{",
        "[]",
        '{"tensors": {"a": 1}}',
        '{"tensors": {"a": {"shape": [2], "dtype": "strange"}}}',
    ):
        manifest.write_text(text)
        refused(target, f"{MANIFEST}")


PLANTED = ("modeling_llama.py", "pytorch_model.bin", "training_args.pkl")


def test_nothing_is_unpickled_and_no_code_of_the_model_runs(folder: Path, tmp_path: Path):
    """An audit hook sees every opened file and every object that a pickle names."""
    code = (
        "import os, sys\n"
        "from jaxdet.checkpoints import open_checkpoint\n"
        "seen = []\n"
        "def hook(event, args):\n"
        "    if event == 'open' and isinstance(args[0], str): seen.append(os.path.basename(args[0]))\n"
        "    if event == 'pickle.find_class': seen.append(event)\n"
        "sys.addaudithook(hook)\n"
        "for path in sys.argv[1:]:\n"
        "    checkpoint = open_checkpoint(path)\n"
        "    checkpoint.tokenizer(); checkpoint.digest()\n"
        "print(' '.join(seen))\n"
    )
    config = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_llama.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    orbax = tmp_path / "orbax"
    save_checkpoint(orbax, open_checkpoint(folder), format="orbax", progress=False)
    for name in PLANTED:
        (folder / name).write_bytes(b"\x80\x04raise SystemExit('ran')")
        (orbax / name).write_bytes(b"\x80\x04raise SystemExit('ran')")
    done = subprocess.run(
        [sys.executable, "-c", code, folder, orbax], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "config.json" in done.stdout.split()  # the hook does see
    assert not {*PLANTED, "pickle.find_class"} & set(done.stdout.split())


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


@pytest.mark.parametrize(
    "model", ["smollm3", "no/such/model", "./absent", "~/absent", "/absent", "model.gguf", ""]
)
def test_unknown_models(model: str):
    with pytest.raises((FileNotFoundError, ValueError), match="model") as caught:
        open_checkpoint(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["models/x.gguf", "absent/x.gguf", "models/x", "x.gguf", "models/sub/x"])
def test_a_mistyped_path_is_no_model_of_the_hub(tmp_path: Path, monkeypatch, model: str):
    def asked(*_):
        pytest.fail("asked the hub")

    monkeypatch.setattr("jaxdet.checkpoints.fetch_from_hub", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sub").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"^no model '{model}' \(no such file\); give "):
        open_checkpoint(model)
    with pytest.raises(pytest.fail.Exception, match="asked the hub"):  # negative control
        open_checkpoint("organisation/x")


def build(path: Path, dtype=jnp.float32):
    checkpoint = open_checkpoint(path)
    return build_model(checkpoint, checkpoint.config, dtype=dtype, backend="xla", max_model_len=64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "architecture 'mamba2' is not supported; supported: llama, qwen2"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "64"}, "hidden_size='64' must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 must be"),
        ({"num_hidden_layers": 3}, r"no tensor 'model\.layers\.2\."),
        (
            {"vocab_size": 289},
            r"embed_tokens\.weight has shape \(288, 64\) but the config asks for \(289, 64\)",
        ),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 must be a positive number"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn' is not supported"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "rope_type 'linear' needs 'factor'",
        ),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' must be a positive number"),
        ({"rope_parameters": 7}, "rope_parameters=7"),
    ],
    ids=str,
)
def test_bad_configs_are_named(references: Path, tmp_path: Path, change: dict, message: str):
    path = tmp_path / "model"
    shutil.copytree(references / "llama", path)
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        build(path)
    assert "\n" not in str(caught.value)


WINDOWS = [
    (family, {"sliding_window": w}) for family in ("mistral", "gemma3_text") for w in (0, -3, "x", True)
]
WINDOWS += [("qwen2", {"sliding_window": w, "use_sliding_window": True}) for w in (0, -3, "x", 1.5)]
TYPES = (
    [],
    ["full_attention"] * 4,
    ["full_attention", "sparse"],
    ["full_attention", []],
    "full_attention",
    7,
)
KINDS = [(family, {"layer_types": t}) for family in ("qwen2", "qwen3", "gemma3_text") for t in TYPES]
GEMMA_FIELDS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
OTHERS = [("gemma3_text", {field: v}) for field in GEMMA_FIELDS for v in ("x", -1, [1])]
OTHERS += [
    ("gemma3_text", {"sliding_window_pattern": "x", "layer_types": None}),
    ("gemma3_text", {"sliding_window_pattern": 0, "layer_types": None}),
    ("gemma3_text", {"rope_local_base_freq": "x", "rope_parameters": None}),
    ("gemma3_text", {"text_config": 7}),
    ("gemma3_text", {"rope_parameters": 7}),
    (
        "qwen2",
        {"max_window_layers": "x", "use_sliding_window": True, "sliding_window": 4, "layer_types": None},
    ),
    ("llama", {"model_type": ["llama"]}),
    ("llama", {"hidden_act": ["silu"]}),
    ("llama", {"rope_scaling": {"rope_type": ["linear"]}, "rope_parameters": None}),
    ("llama", {"rope_scaling": {"type": {}, "rope_type": 7}, "rope_parameters": None}),
    ("llama", {"rms_norm_eps": True}),
]
SHOWN_AS = {"model_type": "architecture", "hidden_act": "activation", "rope_scaling": "rope_type"}


@pytest.mark.parametrize(("family", "change"), [*WINDOWS, *KINDS, *OTHERS], ids=str)
def test_fields_of_one_family_are_named(references: Path, family: str, change: dict):
    """The first field of `change` is the wrong one."""
    config = json.loads((references / family / "config.json").read_text())
    family_of(config).read_config(config)
    field = next(iter(change))
    with pytest.raises(ValueError, match=SHOWN_AS.get(field, field)) as caught:
        family_of(config | change).read_config(config | change)
    assert "\n" not in str(caught.value)


def test_windows_as_they_are_written(references: Path):
    """What is refused above is refused for its value."""

    def windows(family: str, **change):
        config = json.loads((references / family / "config.json").read_text()) | change
        return family_of(config).read_config(config).windows

    assert windows("mistral", sliding_window=5) == (5, 5)
    assert windows("mistral", sliding_window=None) == (None, None)
    assert windows("gemma3_text", layer_types=None, sliding_window_pattern=2, sliding_window=9)[:2] == (
        9,
        None,
    )
    assert (
        windows("gemma3_text", layer_types=["full_attention", "sliding_attention", "full_attention"])[0]
        is None
    )
    on = {"use_sliding_window": True, "sliding_window": 6}
    assert windows("qwen2", layer_types=None, max_window_layers=1, **on) == (None, 6)
    assert windows("qwen2", layer_types=None, max_window_layers=0, **on) == (6, 6)
    assert windows("qwen2", layer_types=["sliding_attention", "full_attention"], **on) == (6, None)
    assert windows("qwen2", use_sliding_window=False, sliding_window=6) == (None, None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(references: Path, tmp_path: Path, value: float):
    path = tmp_path / "model"
    shutil.copytree(references / "llama", path)
    tensors = load_file(path / "model.safetensors")
    build(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][-1, -1] = value
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name} holds NaN or inf"):
        build(path)
