"""The engine on Qwen3-8B's shape in bfloat16 beside plain jitted JAX; needs a GPU with about 110 GB.

    python benchmarks/serve_offline.py OUT [--only NAME ...] [--no-plain] [--layers 36] [--compile-all]

Random weights (only shapes matter to speed), random prompts, greedy, end-of-sequence ignored. A decode rate is
batch · 128 / (seconds for 129 tokens − seconds for 1 token), scheduler, sampler and host included. Plain JAX has a
static cache as long as the longest sequence needs, once with a scan over layers and once unrolled, and keeps its
tokens on the device; its prefill is one sequence at a time, and for completions it computes the prompt 1000 times.
"Limit" is arithmetic: the weights and the cache read once a step at the rate at which the card reads a large array, or
the products at the rate that it holds for a second of large ones, both measured here. Everything runs once unmeasured,
so that nothing compiles in between, then three times, of which the median counts, or once (plain JAX).
Writes OUT/serve_offline.json.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import pathlib
import statistics
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")  # `kernels` would rather not

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from kernels import ceilings

from jaxdet.baseline import Baseline, decoder_layer, lm_head
from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.engine.engine import Engine
from jaxdet.llm import steps_at_once
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import QWEN3_8B, random_model

PROMPT, OUTPUT = 128, 128
MODEL_LEN, PAGES = 8448, 3300
DECODE = {"decode 1": 1, "decode 8": 8, "decode 64": 64, "decode 256": 256, "decode 1000": 1000}
TARGETS = {
    "decode 1": 235,
    "decode 8": 1800,
    "decode 64": 13000,
    "decode 256": 31000,
    "decode 1000": 32000,
    "decode 1 at 8k": 215,
    "prefill 4 x 8192": 41000,
    "1000 completions": 3.1,
}
VLLM = {
    "decode 1": 192,
    "decode 8": 1462,
    "decode 64": 10303,
    "decode 256": 22124,
    "decode 1000": 24378,
    "decode 1 at 8k": 180,
    "prefill 4 x 8192": 38452,
    "1000 completions": 4.7,
}
"""vLLM 0.24.0's default mode on one H200, 2026-11-24; not measured here."""


class Bench:
    """One engine and what runs on it."""

    def __init__(self, layers: int):
        self.layers, self.rng = layers, np.random.default_rng(0)
        self.steps: list[float] = []
        """Seconds of each step of the last run."""
        model = random_model(
            QWEN3_8B | {"num_hidden_layers": layers},
            dtype=jnp.bfloat16,
            backend=None,
            max_model_len=MODEL_LEN,
        )
        self.engine = Engine(
            model,
            salt="",
            max_model_len=MODEL_LEN,
            max_num_seqs=1000,
            max_num_batched_tokens=8192,
            num_pages=PAGES,
            num_scheduler_steps=steps_at_once(model),
        )

    def seconds(self, batch: int, prompt: int, output: int, *, same: bool = False) -> float:
        """Wall time of `batch` requests, from the first to the last token of all."""
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        prompts = self.rng.integers(0, QWEN3_8B["vocab_size"], (1 if same else batch, prompt)).tolist()
        began = time.perf_counter()
        for i in range(batch):
            self.engine.add(prompts[0 if same else i], params)
        self.steps, now = [], time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
            before, now = now, time.perf_counter()
            self.steps.append(now - before)
        return now - began

    def typical(self, *work: int, same: bool = False) -> float:
        """The median of `seconds` three times, after a first time that compiles."""
        self.seconds(*work, same=same)
        return statistics.median(self.seconds(*work, same=same) for _ in range(3))

    def decode(self, batch: int, prompt: int = PROMPT) -> float:
        """Tokens a second."""
        first, whole = self.typical(batch, prompt, 1), self.typical(batch, prompt, OUTPUT + 1)
        return batch * OUTPUT / (whole - first)

    def prefill(self) -> float:
        return 4 * 8192 / self.typical(4, 8192, 1)

    def completions(self) -> float:
        """Seconds for 1000 completions of 100 tokens of one prompt."""
        return self.typical(1000, 32, 100, same=True)


class RandomCheckpoint:
    """Tensors drawn on the device when they are read."""

    def __init__(self, layers: int):
        self.config = QWEN3_8B | {"num_hidden_layers": layers}
        c, d = QWEN3_8B, QWEN3_8B["head_dim"]
        hidden, inner = c["hidden_size"], c["intermediate_size"]
        q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
        block = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden)}
        block |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q)}
        block |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
        block |= {"mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,)}
        block |= {"post_attention_layernorm": (hidden,), "self_attn.q_norm": (d,), "self_attn.k_norm": (d,)}
        shapes = {"model.embed_tokens": (c["vocab_size"], hidden), "model.norm": (hidden,)}
        shapes |= {"lm_head": (c["vocab_size"], hidden)}
        for i in range(layers):
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
        self.tensors = {f"{name}.weight": shape for name, shape in shapes.items()}

    def read(self, name: str) -> jax.Array:
        return _draw(jax.random.key(hash(name) % 2**31), self.tensors[name])


@functools.partial(jax.jit, static_argnums=1)
def _draw(key, shape):
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(0.02, jnp.bfloat16)


class Plain:
    """Plain JAX on a static cache, unrolled and as a scan over layers; greedy, the tokens stay on the device."""

    def __init__(self, layers: int):
        self.model = Baseline(RandomCheckpoint(layers), dtype="bfloat16", max_model_len=MODEL_LEN)
        self.unrolled = self._greedy(self.model.forward.__wrapped__)
        self.scanned = self._greedy(self._scanned)

    @staticmethod
    def _greedy(forward):
        def advance(params, cache, tokens, at):
            logits, cache = forward(params, cache, tokens, at)
            return jnp.argmax(logits[:, 0], axis=1).astype(jnp.int32)[:, None], cache

        return jax.jit(advance, donate_argnums=1)

    def _scanned(self, params, cache, tokens, start):
        c = self.model.config
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        angles = params["rope"][0][positions][:, :, None]

        def layer(x, weights):
            return decoder_layer(c, weights[0], x, positions, start, angles, None, weights[1])

        x, cache = lax.scan(layer, params["embedding"][tokens], (params["layers"], cache))
        return lm_head(c, params, x[:, -1:]), cache

    def rates(self, names: list[str]) -> dict[str, dict[str, float]]:
        """By "unrolled" and "scan" each row's rate or seconds. The weights are stacked for the scan: once only."""
        found = {"unrolled": self._rates(names, self.unrolled, self.model.params, self.model.new_cache)}
        layers = self.model.params["layers"]
        stacked = {name: jnp.stack([layer.pop(name) for layer in layers]) for name in list(layers[0])}

        def new_cache(batch):
            c = self.model.config
            shape = c.num_layers, batch, self.model.max_model_len, c.num_kv_heads, c.head_dim
            return tuple(jnp.zeros(shape, self.model.dtype) for _ in range(2))

        return found | {
            "scan": self._rates(names, self.scanned, self.model.params | {"layers": stacked}, new_cache)
        }

    def _rates(self, names, step, params, new_cache) -> dict[str, float]:
        def seconds(batch: int, prompt: int, decoded: int, at: int = 0) -> float:
            """Of a step of `prompt` tokens at position `at`, and `decoded` steps of one; the second time."""
            self.model.max_model_len = at + prompt + decoded
            for _ in range(2):
                ids = jnp.ones((batch, prompt), jnp.int32)
                cache = jax.block_until_ready(new_cache(batch))
                began = time.perf_counter()
                for i in range(decoded + 1):
                    start = jnp.full(batch, at + prompt + i - 1 if i else at, jnp.int32)
                    ids, cache = step(params, cache, ids, start)
                jax.block_until_ready(ids)
                took = time.perf_counter() - began
                del cache
            return took

        found = {}
        for name in names:
            try:
                if name == "prefill 4 x 8192":
                    found[name] = 8192 / seconds(1, 8192, 0)
                elif name == "1000 completions":
                    found[name] = seconds(1000, 32, 99)
                else:
                    batch, at = (1, 8192) if "8k" in name else (DECODE[name], PROMPT)
                    found[name] = batch * OUTPUT / seconds(batch, 1, OUTPUT - 1, at)
            except jax.errors.JaxRuntimeError as problem:  # a scan's old and new cache are there at once
                if "RESOURCE_EXHAUSTED" not in str(problem):
                    raise
                print("plain, out of memory:", name, flush=True)
            else:
                print("plain", name, round(found[name], 2), flush=True)
        return found


def weights_of(config: dict) -> tuple[int, int]:
    """Numbers that a step multiplies by: of all layers, and of the head."""
    hidden, inner, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    block = hidden * (heads + 2 * kv) * d + heads * d * hidden + 3 * hidden * inner
    return config["num_hidden_layers"] * block, hidden * config["vocab_size"]


def decode_limit(config: dict, rows: int, context: float, reading: float, flops: float) -> float:
    """The least seconds of a decode step in bfloat16, at the card's bytes and operations a second."""
    weights, cache = sum(weights_of(config)), config["num_key_value_heads"] * config["head_dim"] * 2 * 2
    attention = rows * context * config["num_hidden_layers"] * cache
    return max((2 * weights + attention) / reading, 2 * rows * weights / flops)


def limit(name: str, layers: int, reading: float, flops: float) -> float:
    """The rate (or for completions the seconds) that the card's ceilings allow: bytes and operations a second."""
    config = QWEN3_8B | {"num_hidden_layers": layers}
    if name == "prefill 4 x 8192":
        attention = layers * 2 * 8192**2 * config["num_attention_heads"] * config["head_dim"] / flops
        return 8192 / (2 * 8192 * weights_of(config)[0] / flops + attention)
    if name == "1000 completions":
        return 100 * decode_limit(config, 1000, 80, reading, flops)
    rows, context = (1, 8192 + OUTPUT / 2) if "8k" in name else (DECODE[name], PROMPT + OUTPUT / 2)
    return rows / decode_limit(config, rows, context, reading, flops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument(
        "--compile-all", action="store_true", help="compile every bucket first, and say how long"
    )
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("serve_offline.py needs a GPU")
    options.out.mkdir(parents=True, exist_ok=True)

    def write(report: dict) -> None:
        (options.out / "serve_offline.json").write_text(json.dumps(report, indent=1) + "\n")

    use_compile_cache()
    reading, flops = (1e6 * x for x in ceilings())
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": importlib.metadata.version("jax"),
        "layers": options.layers,
        "reading TB/s": reading / 1e12,
        "dot TFLOP/s": flops / 1e12,
        "rows": [],
    }
    print(json.dumps(report), flush=True)
    bench = Bench(options.layers)
    engine = bench.engine
    report["backend"] = engine.step_fn.backend
    if options.compile_all:
        began = time.perf_counter()
        engine.compile_all(progress=True)
        report["compile all s"] = time.perf_counter() - began
        report["programs"] = engine.step_fn.compiled
        print("compiled", report["programs"], "programs in", round(report["compile all s"]), "s", flush=True)
    runs = {name: functools.partial(bench.decode, batch) for name, batch in DECODE.items()}
    runs |= {"decode 1 at 8k": functools.partial(bench.decode, 1, 8192), "prefill 4 x 8192": bench.prefill}
    runs |= {"1000 completions": bench.completions}
    for name in options.only:
        began = time.perf_counter()
        ours = runs[name]()
        row = {
            "name": name,
            "ours": ours,
            "target": TARGETS[name],
            "vLLM default": VLLM[name],
            "limit": limit(name, options.layers, reading, flops),
            "dispatches": len(bench.steps),
            "dispatch ms, median and longest": [1e3 * f(bench.steps) for f in (statistics.median, max)],
            "took s": time.perf_counter() - began,
        }
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        write(report)
    report["compiled after start"] = engine.stats().compiled_after_start
    report["memory GB"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9
    del bench, engine, runs
    gc.collect()
    if not options.no_plain:
        report["plain"] = Plain(options.layers).rates(options.only)
    write(report)


if __name__ == "__main__":
    main()
