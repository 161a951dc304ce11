"""SHA-256 digests of a tiny model's logits and of what leads to them.

python tests/digests.py FOLDER      prints them for the tiny model in FOLDER, for test_restart.py
python tests/digests.py --update    records this machine's in golden/digests.json, for test_golden.py
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import op_digests

from jaxdet import LLM, NUMERICS_VERSION, SamplingParams
from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.batch import model_batch
from jaxdet.engine.buckets import Bucket
from jaxdet.engine.scheduler import Part, Plan
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.models.registry import build_model
from jaxdet.testing import FAMILIES, VOCAB_SIZE, write_tiny_model
from pallas_kernels.backend import platform_key, resolve
from pallas_kernels.matmul.op import matmul
from pallas_kernels.numerics import PAGE_SIZE

GOLDEN = Path(__file__).parent / "golden" / "digests.json"
DTYPES = ("float32", "bfloat16")
LENGTH = 150
"""Tokens of the prompt: more than a page and more than a window."""
SAMPLED = SamplingParams(
    temperature=0.9,
    top_p=0.95,
    min_p=0.01,
    frequency_penalty=0.2,
    seed=11,
    n=2,
    max_tokens=8,
    logprobs=5,
    ignore_eos=True,
)


def digests(folder: Path, dtype: str = "float32") -> dict[str, str]:
    """What → digest of its bits."""
    llm = LLM(
        folder, dtype=dtype, max_model_len=256, max_num_seqs=2, max_num_batched_tokens=64, keep_logits=True
    )
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, LENGTH).tolist()
    (output,) = llm.generate([prompt], SAMPLED, use_tqdm=False)
    logprobs = [
        [e[t].logprob for t, e in zip(c.token_ids, c.logprobs or [], strict=True)] for c in output.outputs
    ]
    found = {
        "sampled_ids": np.array([c.token_ids for c in output.outputs], np.int32),
        "logprobs": np.array(logprobs, np.float32),
        "logits": np.stack([c.logits for c in output.outputs]),
        "prompt_logprobs": np.array(llm.score([prompt])[0].logprobs, np.float32),
    }
    return {name: digest(value) for name, value in (found | _intermediates(folder, dtype, prompt)).items()}


def _intermediates(folder: Path, dtype: str, prompt: list[int]) -> dict[str, np.ndarray]:
    """The first layer's values for the whole prompt in one piece."""
    checkpoint = open_checkpoint(folder)
    model = build_model(
        checkpoint, checkpoint.config, dtype=jnp.dtype(dtype), backend=resolve(None), max_model_len=256
    )
    sequence = Sequence(
        request_id="",
        prompt=prompt,
        params=SamplingParams(),
        sample_index=0,
        seed=0,
        max_tokens=1,
        stop_ids=frozenset(),
        pages=[1, 2],
    )
    plan = Plan(chunks=[Part(sequence, 0, LENGTH, [], True)])
    batch, _ = model_batch(plan, Bucket(0, 256, 1), table=2)
    layer, c = model.layers[0], model.config
    rope = model.rope[c.rope_of_layer[0]][...]
    x = jax.jit(model.embed)(batch.tokens)
    norm = jax.jit(layer.input_norm)(x)
    width = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    qkv = jax.jit(lambda x: matmul(x, layer.attention.qkv[...], n=width))(norm)
    attend = jax.jit(lambda x, batch, kv: layer.attention(x, layer.input_norm, batch, rope, kv))
    attention, (keys, values) = attend(x, batch, Step(model).new_cache(3, PAGE_SIZE)[0])
    found = {"rope_table": rope, "embedding": x, "rms_norm": norm, "matmul": qkv, "attention": attention}
    found |= {
        "mlp": jax.jit(lambda x: layer.mlp(x, layer.input_norm))(x),
        "keys": keys[1],
        "values": values[1],
    }
    return {name: np.asarray(v if len(v) != len(x) else v[:LENGTH]) for name, v in found.items()}


def digest(value: np.ndarray) -> str:
    text = f"{value.dtype}/{value.shape}/".encode()
    return hashlib.sha256(text + np.ascontiguousarray(value).tobytes()).hexdigest()[:16]


def update() -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        models = {family: write_tiny_model(Path(folder) / family, family) for family in FAMILIES}
        found = {f"{f}/{dtype}": digests(path, dtype) for f, path in models.items() for dtype in DTYPES}
    golden[platform_key()] = {
        "numerics_version": NUMERICS_VERSION,
        "models": found,
        "ops": op_digests.digests(),
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"recorded {platform_key()} in {GOLDEN}")


if __name__ == "__main__":
    if sys.argv[1] == "--update":
        update()
    else:
        print(json.dumps(digests(Path(sys.argv[1]))))
