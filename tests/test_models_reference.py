"""Each family's logits against transformers' float64, float32 and bfloat16, through the engine's step."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.batch import model_batch
from jaxdet.engine.buckets import Bucket
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.models.registry import build_model
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import PAGE_SIZE

FAMILIES = (
    "llama",
    "llama_rope_scaling",
    "qwen2",
    "qwen3",
    "mistral",
    "mistral_window",
    "gemma3_text",
)
FLOAT32_ENOUGH = 1e-6
"""A relative error that counts as good whatever transformers' own is: 8 units in the last place."""


def logits_of(folder, ids, dtype) -> np.ndarray:
    """float32 [sequences, tokens, vocab], all sequences in one prefill step."""
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint, checkpoint.config, dtype=dtype, backend="xla", max_model_len=PAGE_SIZE)
    step = Step(model)
    sequences = []
    for row, tokens in enumerate(ids):
        sequences.append(
            Sequence(
                request_id=str(row),
                prompt=tokens.tolist(),
                params=SamplingParams(),
                sample_index=0,
                seed=0,
                max_tokens=1,
                stop_ids=frozenset(),
            )
        )
        sequences[-1].pages = [row + 1]
    count, length = ids.shape
    plan = Plan(chunks=[Part(s, 0, length, [], True) for s in sequences])
    batch, _ = model_batch(plan, Bucket(0, 512, count), table=1)
    logits, _ = step.forward(step.new_cache(count + 1, PAGE_SIZE), batch)
    assert logits.dtype == jnp.float32
    return np.asarray(logits)[: count * length].reshape(count, length, -1)


def relative(found, exact) -> float:
    return np.abs(found.astype(np.float64) - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_float64_as_transformers(references, family, dtype):
    with np.load(references / family / "reference.npz") as saved:
        exact, theirs, ids = saved["logits_float64"], saved[f"logits_{dtype}"], saved["ids"]
    found = logits_of(references / family, ids, jnp.dtype(dtype))
    error, allowed = relative(found, exact), 1.5 * relative(theirs, exact)
    if dtype == "float32":
        allowed = max(allowed, FLOAT32_ENOUGH)
        np.testing.assert_array_equal(found.argmax(-1), exact.argmax(-1))
    assert error <= allowed, f"{family} {dtype}: {error:.2e} > {allowed:.2e}"


def change_weights(source, target, change):
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file(
        {n: np.ascontiguousarray(change(n, v)) for n, v in tensors.items()}, target / "model.safetensors"
    )


def change_config(source, target, change):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | change(config)))


def interleave(name, value):
    """q and k rows as GGUF stores them."""
    if "q_proj" not in name and "k_proj" not in name:
        return value
    heads = 4 if "q_proj" in name else 2
    return value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def plain_rope(config):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    }


@pytest.mark.parametrize(
    ("family", "spoil"),
    [
        ("llama", lambda s, t: change_weights(s, t, interleave)),
        ("llama_rope_scaling", lambda s, t: change_config(s, t, plain_rope)),
        ("qwen2", lambda s, t: change_weights(s, t, lambda n, v: v * 0 if n.endswith("k_proj.bias") else v)),
        ("qwen3", lambda s, t: change_weights(s, t, lambda n, v: v * 0 + 1 if "q_norm" in n else v)),
        ("mistral_window", lambda s, t: change_config(s, t, lambda c: {"sliding_window": None})),
        ("gemma3_text", lambda s, t: change_config(s, t, lambda c: {"query_pre_attn_scalar": 32})),
    ],
    ids=["permuted q and k", "no rope scaling", "no k bias", "no q norm", "no window", "wrong scale"],
)
def test_a_wrong_model_is_noticed(references, tmp_path, family, spoil):
    """Negative control: the comparison above fails by orders of magnitude for each likely mistake."""
    with np.load(references / family / "reference.npz") as saved:
        exact, theirs, ids = saved["logits_float64"], saved["logits_float32"], saved["ids"]
    spoil(references / family, tmp_path / "model")
    error = relative(logits_of(tmp_path / "model", ids, jnp.float32), exact)
    assert error > max(100 * relative(theirs, exact), 1e-3)


def test_missing_tensor_is_named(references, tmp_path):
    shutil.copytree(references / "qwen3", tmp_path / "model")
    name = "model.layers.1.self_attn.k_norm.weight"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match=name):
        build_model(checkpoint, checkpoint.config, dtype=jnp.float32, backend="xla", max_model_len=PAGE_SIZE)
