"""A trainer's tensors on the device, laid out to the bits that loading the checkpoint gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdet import LLM
from jaxdet.checkpoints import open_checkpoint
from jaxdet.rl.layout import packed
from jaxdet.testing import FAMILIES, write_tiny_model

FAST = "llama", "gemma3_text"
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("family", NAMES)
def test_as_loaded(tmp_path, family):
    folder = write_tiny_model(tmp_path / "model", family)
    llm = LLM(folder, dtype="bfloat16", max_model_len=256, num_pages=3)
    checkpoint = open_checkpoint(folder)
    tensors = {name: jnp.asarray(checkpoint.read(name)) for name in checkpoint.tensors}
    assert all(x.dtype == jnp.float32 for x in tensors.values())
    digest, expected = llm.weights_digest, jax.tree.map(np.asarray, llm.params)
    found = packed(llm, tensors)
    compared = 0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), other)
        compared += other.size
    assert compared >= sum(x.size for x in tensors.values())
    llm.update_weights(jax.tree.map(lambda x: x * 2, found))
    assert llm.weights_digest != digest
    llm.update_weights(found)
    assert llm.weights_digest == digest


def test_refusals(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    llm = LLM(folder, dtype="bfloat16", max_model_len=256, num_pages=3)
    checkpoint = open_checkpoint(folder)
    tensors = {name: jnp.asarray(checkpoint.read(name)) for name in checkpoint.tensors}
    norm = tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"^tensors lacks model.norm.weight; give every tensor of the model"):
        packed(llm, tensors)
    with pytest.raises(
        ValueError, match=r"^tensors: model.norm.weight has shape \(63,\) but the model asks for"
    ):
        packed(llm, tensors | {"model.norm.weight": norm[1:]})
