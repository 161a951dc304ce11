"""Trained weights as a Hugging Face folder: the bits that were trained, from the very names that loading asks for."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.models.origins import origins
from jaxdet.models.qwen3 import Qwen3
from jaxdet.models.weights import Weights
from jaxdet.rl.export import export
from jaxdet.testing import FAMILIES, write_tiny_model

FAST = "llama", "gemma3_text"
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
PROMPT = list(range(5, 90))


def load(folder) -> LLM:
    return LLM(folder, dtype="bfloat16", max_model_len=128, num_pages=3)


def trained(llm: LLM):
    """Masters that no checkpoint had: every value is moved by its own small step, norms far below 1 among them."""
    rng = np.random.default_rng(0)

    def moved(x):
        masters = np.asarray(x, np.float32)
        return jnp.asarray(masters * rng.uniform(0.01, 2, x.shape).astype(np.float32))

    return jax.tree.map(moved, llm.params)


def logprobs(llm: LLM) -> np.ndarray:
    (score,) = llm.score([PROMPT])
    return np.asarray(score.logprobs[1:], np.float32)


@pytest.mark.parametrize("family", NAMES)
def test_the_same_bits_again(tmp_path, family):
    folder = write_tiny_model(tmp_path / "model", family)
    llm = load(folder)
    before, masters = logprobs(llm), trained(llm)
    llm.update_weights(masters)
    expected = logprobs(llm)
    for name, params, dtype in (("bfloat16", None, "bfloat16"), ("masters", masters, "float32")):
        export(tmp_path / name, llm, folder, params, progress=False)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        found = load(tmp_path / name)
        assert found.weights_digest == llm.weights_digest
        assert logprobs(found).tobytes() == expected.tobytes()
    assert expected.size == len(PROMPT) - 2
    assert np.count_nonzero(before != expected) > expected.size // 2, "it would see other weights"
    wide = open_checkpoint(tmp_path / "masters")
    kinds = {wide.tensors[name].dtype for name in wide.tensors if "norm" in name}
    assert (np.dtype(np.float64) in kinds) == (family == "gemma3_text"), "norms less 1 need more digits"


@pytest.mark.parametrize("family", NAMES)
def test_untrained_weights_are_the_files(tmp_path, family):
    """Every tensor of the source, in its place, to the bit: nothing is left out, swapped or transposed."""
    folder = write_tiny_model(tmp_path / "model", family)
    llm = LLM(folder, dtype="float32", max_model_len=128, num_pages=3)
    export(tmp_path / "copy", llm, folder, progress=False)
    source, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "copy"))
    assert source.keys() == copy.keys()
    for name, value in source.items():
        if family == "gemma3_text" and "norm" in name:  # float32 of w + 1 is all that is left of w
            value = (value + np.float32(1)) - np.float32(1)
        assert (copy[name].dtype, copy[name].shape) == (value.dtype, value.shape)
        assert copy[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("backend", ["mosaic_gpu", "mosaic_tpu"])
def test_layouts_of_other_backends(tmp_path, backend):
    """Hopper's and a TPU's layouts are taken apart on the host."""
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "model", "qwen3"))
    c, dtype = Qwen3.read_config(checkpoint.config), jnp.dtype(jnp.bfloat16)
    model = Qwen3(Weights(checkpoint, dtype, backend, c), c, 2)
    values = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    seen = {}
    for path, parameter in nnx.to_flat_state(origins(Qwen3, c, dtype, backend)):
        seen |= parameter.get_value().tensors(values[path][...], c, backend)
    assert seen.keys() == checkpoint.tensors.keys()
    for name, found in seen.items():
        expected = checkpoint.read(name).astype(found.dtype)
        assert (found.shape, found.tobytes()) == (expected.shape, expected.tobytes()), name


def test_gemma_without_its_vision_tower(tmp_path):
    """The text of a model with images goes out as a text model: without a prefix, and with the whole's end tokens."""
    folder = write_tiny_model(tmp_path / "model", "gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": x for name, x in tensors.items()}, folder / "model.safetensors")
    llm = load(folder)
    export(tmp_path / "text", llm, folder, progress=False)
    found = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (found["model_type"], found["eos_token_id"]) == ("gemma3_text", [1, 106])
    assert "vision_config" not in found
    assert load_file(tmp_path / "text" / "model.safetensors").keys() == tensors.keys()
    assert load(tmp_path / "text").weights_digest == llm.weights_digest


def test_refusals(tmp_path):
    folder, other = write_tiny_model(tmp_path / "model"), write_tiny_model(tmp_path / "other", "qwen3")
    llm = load(folder)
    with pytest.raises(ValueError, match=r"^like='other' is another model than 'model'; give what that was"):
        export(tmp_path / "out", llm, other)
    with pytest.raises(ValueError, match=r"^params must have the tree and shapes of llm.params; give a"):
        export(tmp_path / "out", llm, folder, jax.tree.map(lambda x: x[:-1], llm.params))
    with pytest.raises(FileExistsError, match=r"exists; choose another name"):
        export(other, llm, folder)
    llm.update_weights(jax.tree.map(lambda x: x * jnp.inf, llm.params))
    export(tmp_path / "nan", llm, folder, progress=False)
    with pytest.raises(ValueError, match=r"holds NaN or inf"):
        load(tmp_path / "nan")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it(tmp_path, family):
    """Where torch and transformers are installed, which nothing here asks for."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    folder = write_tiny_model(tmp_path / "model", family)
    llm = LLM(folder, dtype="float32", max_model_len=128, num_pages=3)
    before = logprobs(llm)
    llm.update_weights(trained(llm))
    export(tmp_path / "out", llm, folder, progress=False)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="float32", output_loading_info=True
    )
    assert not any(loading.values()), "every tensor has its place, and every place its tensor"
    with torch.no_grad():
        found = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0, 1:-1], -1)
    theirs = found.numpy()[np.arange(len(PROMPT) - 2), PROMPT[2:]]
    np.testing.assert_allclose(logprobs(llm), theirs, rtol=0, atol=1e-4)
    assert np.abs(before - theirs).max() > 0.1, "it would see other weights"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("Héllo", add_special_tokens=False) == llm.tokenizer.encode("Héllo")
    assert tokenizer.eos_token == llm.tokenizer.eos_token
