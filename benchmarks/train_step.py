"""What exactness costs in training: a step through `jaxdet.rl` beside the same step in plain JAX, in one process.

    python benchmarks/train_step.py [--shape qwen3-8b] [--layers N] [--micro-batches 4] [--remat both] [--out FILE]

A step is zeroed sums, a forward and backward pass of every micro-batch, AdamW on float32 masters, and the masters
rounded to bfloat16. Both sides have the same weights, tokens, layers, optimizer and rematerialisation, unrolled layers,
float32 sums and donated buffers. Plain JAX is `jnp.dot` and `jax.nn.dot_product_attention` (cuDNN on a GPU), has all
logits at once in bfloat16, and rounds its weights in the optimizer's own program. One side is gone before the other
begins. Loss and gradient norm of the first step are written for both: they agree if both compute the same thing.

Before that, the gradient sums of one micro-batch are compared bit by bit with those of its halves; as a control, with
those of its sequences in another order. Writes JSON after every side; exits with 1 if a side failed (as when memory
doesn't suffice), bits differ that must not, or the control's don't. Run alone on the machine.
"""

import collections
import concurrent.futures
import dataclasses
import enum
import functools
import gc
import json
import os
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx

from jaxdet.baseline import ACTIVATIONS, _norm, _rotate
from jaxdet.engine.step import Step
from jaxdet.files import write_whole
from jaxdet.models.config import ModelConfig, inverse_frequencies
from jaxdet.models.registry import backend_of, family_of
from jaxdet.models.weights import tensor_shape
from jaxdet.rl import GradientSums, accumulate, logprobs, optimize, pack
from jaxdet.rl.layout import _Given
from jaxdet.testing import COMMON, FAMILIES, QWEN3_8B, SMOLLM2
from jaxdet.verify.report import environment
from pallas_kernels.arrays import round_up
from pallas_kernels.backend import compiler_options
from pallas_kernels.numerics import GRADIENT_ROWS
from pallas_kernels.rope_cache.op import rope_table

PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}
"""Dense bfloat16, from the data sheets."""
MAX_GRAD_NORM = 1.0
SHOWN_KERNELS = 12


class Shape(enum.StrEnum):
    qwen3_8b = "qwen3-8b"
    smollm2 = "smollm2"
    tiny = "tiny"


class Remat(enum.StrEnum):
    off = "off"
    on = "on"
    both = "both"


SHAPES = {
    Shape.qwen3_8b: QWEN3_8B,
    Shape.smollm2: SMOLLM2,
    Shape.tiny: {"model_type": "qwen3"} | COMMON | FAMILIES["qwen3"],
}
SETTINGS = {Remat.off: [False], Remat.on: [True], Remat.both: [False, True]}


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides compute."""

    raw: dict[str, Any]
    """As a config.json."""
    config: ModelConfig
    tokens: np.ndarray
    """[micro-batches, sequences, length]"""
    weights: np.ndarray
    """float32, alike: a sequence's advantage / scored tokens of the step; 0 at its last token."""
    optimizer: optax.GradientTransformation

    @classmethod
    def drawn(cls, raw: dict[str, Any], micro_batches: int, sequences: int, length: int) -> "Work":
        rng, shape = np.random.default_rng(0), (micro_batches, sequences, length)
        weights = np.broadcast_to(rng.standard_normal((micro_batches, sequences, 1)), shape).astype(
            np.float32
        )
        weights /= micro_batches * sequences * (length - 1)
        weights[..., -1] = 0
        tokens = rng.integers(0, raw["vocab_size"], shape, np.int32)
        return cls(raw, family_of(raw).read_config(raw), tokens, weights, optax.adamw(1e-6))

    def read(self, name: str) -> jax.Array:
        """A tensor by its Hugging Face name, [out, in] for matrices, drawn on the device."""
        return _draw(jax.random.key(zlib.crc32(name.encode())), tensor_shape(name, self.config))

    @property
    def flops(self) -> float:
        """Of the model's products, three times the forward pass's; a query's products with later keys don't count."""
        c, (_, _, length) = self.config, self.tokens.shape
        products = layer_size(c) * c.num_layers + c.vocab_size * c.hidden_size
        attention = c.num_layers * c.num_q_heads * c.head_dim * length
        return 6 * self.tokens.size * (products + attention)


@functools.partial(jax.jit, static_argnums=1)
def _draw(key, shape):
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.asarray(0.02, jnp.bfloat16)


def layer_size(c: ModelConfig) -> int:
    """Parameters of a layer's matrices."""
    heads = 2 * (c.num_q_heads + c.num_kv_heads) * c.head_dim
    return c.hidden_size * (heads + 3 * c.intermediate_size)


def fitting_layers(raw: dict[str, Any], tokens: int, remat: bool) -> int:
    """How many layers the device has memory for, by a generous estimate; as many as the shape has if none is known.

    Weights, masters, two moments and sums are 18 bytes a parameter, gradients on their way into the sums 2 more. What
    autodiff keeps of a layer is counted in vectors a token, and logits with 8 bytes.
    """
    c = family_of(raw).read_config(raw)
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return c.num_layers
    head = c.vocab_size * c.hidden_size * (1 if c.tied_embeddings else 2)
    heads = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    kept = 2 * tokens * (8 * c.hidden_size + 3 * heads + 5 * c.intermediate_size)
    fixed = 20 * head + 8 * tokens * c.vocab_size + kept
    layer = 20 * layer_size(c) + (2 * tokens * c.hidden_size if remat else kept)
    return min(c.num_layers, int((stats["bytes_limit"] - fixed) // layer))


class Ours:
    """`jaxdet.rl`'s pieces, put together as its trainer does."""

    def __init__(self, work: Work, remat: bool):
        self.work, dtype, length = work, jnp.dtype(jnp.bfloat16), work.tokens.shape[2]
        backend = backend_of(work.config, dtype, None)
        given = _Given(work, dtype, backend, work.config)  # type: ignore[arg-type]
        self.model = Step(family_of(work.raw)(given, work.config, length))
        self.micros = [self._micro(t, w) for t, w in zip(work.tokens, work.weights, strict=True)]
        half = work.tokens.shape[1] // 2
        first = work.tokens[0], work.weights[0]
        self.halves = [self._micro(*(x[rows] for x in first)) for rows in (np.s_[:half], np.s_[half:])]
        self.turned = self._micro(*(x[::-1] for x in first))
        graph = self.model.graph

        def loss(values, _, weights):
            value = -jnp.sum(values * weights)
            return value, value

        def forward(state, micro, _):
            return logprobs(nnx.merge(graph, state), micro)

        def add(state, sums, micro, weights):
            return accumulate(nnx.merge(graph, state), sums, micro, loss, weights, remat=remat)

        jit = functools.partial(jax.jit, compiler_options=compiler_options(backend))
        masters = jax.eval_shape(_widened, self.model.params)
        sums, moments = (
            jax.eval_shape(GradientSums.zeros, masters),
            jax.eval_shape(work.optimizer.init, masters),
        )
        added: Any = jit(add, donate_argnums=1)
        state, whole, halves = self.model.state, self.micros[0], self.halves[0]
        self.programs = compiled(
            {
                "forward": lambda: jit(forward).lower(state, *whole),
                "accumulate": lambda: added.lower(state, sums, *whole),
                "accumulate half": lambda: added.lower(state, sums, *halves),
                "update": lambda: optimize.update.lower(  # type: ignore  # jitted, which its type doesn't say
                    work.optimizer, MAX_GRAD_NORM, masters, moments, sums
                ),
                "zeros": lambda: jax.jit(GradientSums.zeros).lower(masters),
            }
        )

    def _micro(self, tokens: np.ndarray, weights: np.ndarray):
        """(micro-batch, weight of each of its tokens) on the device."""
        size = tokens.shape[0] * round_up(tokens.shape[1], GRADIENT_ROWS)
        ((micro, where),) = pack(tokens.tolist(), size)
        flat = np.zeros(micro.targets.shape, np.float32)
        for rows, values in zip(where, weights, strict=True):
            flat[rows] = values
        return jax.device_put((micro, flat))

    def cuts(self) -> dict[str, int]:
        """Bits of the sums compared; to be called before `start`, when there is memory for three of them."""

        def sums_of(*micros, program="accumulate"):
            sums = self.programs["zeros"](jax.eval_shape(_widened, self.model.params))
            for micro in micros:
                sums, _ = self.programs[program](self.model.state, sums, *micro)
            return sums

        whole = sums_of(self.micros[0])
        found = {"compared": sum(x.size for x in jax.tree.leaves(whole))}
        found["differ"] = differing(whole, sums_of(*self.halves, program="accumulate half"))
        return found | {"control differs": differing(whole, sums_of(self.turned))}

    def start(self) -> None:
        self.masters = jax.jit(_widened)(self.model.params)
        self.moments = jax.jit(self.work.optimizer.init)(self.masters)

    def zeros(self):
        return self.programs["zeros"](self.masters)

    def forward(self, number: int):
        return self.programs["forward"](self.model.state, *self.micros[number])

    def accumulate(self, sums, number: int):
        """(sums, loss)"""
        return self.programs["accumulate"](self.model.state, sums, *self.micros[number])

    def update(self, sums):
        """The gradient's norm."""
        self.masters, self.moments, norm = self.programs["update"](self.masters, self.moments, sums)
        return norm

    def refresh(self) -> None:
        self.model.update_params(self.masters)

    @property
    def arrays(self):
        """All that lives from step to step."""
        return self.model.state, self.masters, self.moments


class Plain:
    """The same model, loss and optimizer as anybody would write them."""

    def __init__(self, work: Work, remat: bool):
        self.work, c = work, work.config
        names = ["input_layernorm", "post_attention_layernorm"]
        names += [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        names += ["self_attn.q_norm", "self_attn.k_norm"] if c.family == "qwen3" else []
        read = lambda name: work.read(f"model.{name}.weight").T  # noqa: E731
        self.weights: dict[str, Any] = {
            "embedding": work.read("model.embed_tokens.weight"),
            "norm": read("norm"),
            "layers": [{n: read(f"layers.{i}.{n}") for n in names} for i in range(c.num_layers)],
        }
        if not c.tied_embeddings:
            self.weights["head"] = work.read("lm_head.weight").T
        self.micros = [
            jax.device_put((tokens, np.roll(tokens, -1, axis=1), weights))
            for tokens, weights in zip(work.tokens, work.weights, strict=True)
        ]
        angles = jnp.asarray(rope_table(inverse_frequencies(c.rope[0], c.head_dim), work.tokens.shape[2]))
        values = functools.partial(_plain_logprobs, c, angles[None, :, None], remat)

        def add(weights, sums, tokens, targets, advantage):
            loss = lambda weights: -jnp.sum(values(weights, tokens, targets) * advantage)  # noqa: E731
            value, gradient = jax.value_and_grad(loss)(weights)
            return jax.tree.map(lambda total, g: total + g.astype(jnp.float32), sums, gradient), value

        self.optimizer = optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), work.optimizer)

        def update(masters, moments, weights, sums):
            changes, moments = self.optimizer.update(sums, moments, masters)
            new = optax.apply_updates(masters, changes)
            weights = jax.tree.map(lambda wide, old: wide.astype(old.dtype), new, weights)
            return new, moments, weights, optax.global_norm(sums)

        masters = jax.eval_shape(_widened, self.weights)
        moments, micro = jax.eval_shape(self.optimizer.init, masters), self.micros[0]
        forward = jax.jit(lambda weights, tokens, targets, _: values(weights, tokens, targets))
        added: Any = jax.jit(add, donate_argnums=1)
        updated: Any = jax.jit(update, donate_argnums=(0, 1, 2))
        self.programs = compiled(
            {
                "accumulate": lambda: added.lower(self.weights, masters, *micro),
                "forward": lambda: forward.lower(self.weights, *micro),
                "update": lambda: updated.lower(masters, moments, self.weights, masters),
                "zeros": lambda: jax.jit(_zeros).lower(masters),
            },
            threads=1,  # XLA tries kernels of several tiles on the device to find the fastest: one at a time
        )

    def start(self) -> None:
        self.masters = jax.jit(_widened)(self.weights)
        self.moments = jax.jit(self.optimizer.init)(self.masters)

    def zeros(self):
        return self.programs["zeros"](self.masters)

    def forward(self, number: int):
        return self.programs["forward"](self.weights, *self.micros[number])

    def accumulate(self, sums, number: int):
        return self.programs["accumulate"](self.weights, sums, *self.micros[number])

    def update(self, sums):
        call = self.programs["update"]
        self.masters, self.moments, self.weights, norm = call(self.masters, self.moments, self.weights, sums)
        return norm

    def refresh(self) -> None:
        """`update` has done it."""

    @property
    def arrays(self):
        return self.weights, self.masters, self.moments


def _plain_logprobs(c: ModelConfig, angles, remat: bool, weights, tokens, targets):
    """float32 log-probability of every target [B, T]."""
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        scale=c.attention_scale,
        implementation="cudnn" if jax.default_backend() == "gpu" else "xla",
    )

    def layer(x, w):
        y = _norm(x, w["input_layernorm"], c)
        q, k, v = (jnp.dot(y, w[f"self_attn.{n}_proj"]).reshape(*y.shape[:2], -1, c.head_dim) for n in "qkv")
        if "self_attn.q_norm" in w:
            q, k = _norm(q, w["self_attn.q_norm"], c), _norm(k, w["self_attn.k_norm"], c)
        out = attend(_rotate(q, angles), _rotate(k, angles), v)
        x = x + jnp.dot(out.reshape(*x.shape[:2], -1), w["self_attn.o_proj"])
        y = _norm(x, w["post_attention_layernorm"], c)
        inner = ACTIVATIONS[c.activation](jnp.dot(y, w["mlp.gate_proj"])) * jnp.dot(y, w["mlp.up_proj"])
        return x + jnp.dot(inner, w["mlp.down_proj"])

    x = weights["embedding"][tokens]
    for w in weights["layers"]:
        x = (jax.checkpoint(layer) if remat else layer)(x, w)
    head = weights["head"] if "head" in weights else weights["embedding"].T
    logits = jnp.dot(_norm(x, weights["norm"], c), head).astype(jnp.float32)
    # Not take_along_axis: its gradient is a scatter, which XLA doesn't fuse.
    chosen = jnp.arange(c.vocab_size) == targets[..., None]
    return jnp.sum(jnp.where(chosen, logits, 0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _widened(tree):
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def compiled(
    lower: dict[str, Callable[[], jax.stages.Lowered]], threads: int | None = None
) -> dict[str, jax.stages.Compiled]:
    """All programs, compiled in `threads` threads."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(lambda one=one: one().compile()) for name, one in lower.items()}
        return {name: future.result() for name, future in futures.items()}


def differing(a, b) -> int:
    """How many float32 of two trees have other bits."""
    unequal = jax.jit(lambda x, y: jnp.sum(x.view(jnp.uint32) != y.view(jnp.uint32)))
    return sum(int(unequal(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def one_step(side: Ours | Plain):
    """(loss, gradient norm)"""
    sums, losses = side.zeros(), []
    for number in range(len(side.micros)):
        sums, loss = side.accumulate(sums, number)
        losses.append(loss)
    norm = side.update(sums)
    side.refresh()
    return jax.block_until_ready((sum(losses), norm, side.arrays))[:2]


def measure(side: Ours | Plain, repeats: int) -> dict[str, Any]:
    """Medians of what a step takes and of its parts, each waited for; memory; kernels on a GPU."""
    side.start()
    loss, norm = one_step(side)
    found: dict[str, Any] = {"loss": float(loss), "gradient norm": float(norm)}
    times, numbers = collections.defaultdict(list), range(len(side.micros))

    def timed(name: str, call: Callable[[], Any]):
        began = time.perf_counter()
        result = jax.block_until_ready(call())
        times[name].append((time.perf_counter() - began) * 1e3)
        return result

    def forward_and_backward(sums):
        for number in numbers:
            sums, _ = side.accumulate(sums, number)
        return sums

    def parts() -> int:
        """Bytes that live from step to step, the sums included."""
        timed("forward", lambda: [side.forward(number) for number in numbers])
        sums = timed("zeroed sums", side.zeros)
        sums = timed("forward and backward", functools.partial(forward_and_backward, sums))
        timed("optimizer", lambda: (side.update(sums), side.arrays))
        timed("refresh", lambda: (side.refresh(), side.arrays))
        return sum(x.nbytes for x in jax.tree.leaves((side.arrays, sums)))

    resident = parts()
    times.clear()
    for _ in range(repeats):
        timed("step", lambda: one_step(side))
        parts()
    found["ms"] = {name: float(np.median(values)) for name, values in times.items()}
    found["step ms, all"] = times["step"]
    ms, work = found["ms"]["step"], side.work
    found["tokens/s"] = work.tokens.size / ms * 1e3
    found["model TFLOP/s"] = work.flops / ms / 1e9
    if peak := PEAK_FLOPS.get(jax.devices()[0].device_kind):
        found["model FLOP/s utilisation"] = work.flops / ms * 1e3 / peak
    analyses: dict[str, Any] = {name: p.memory_analysis() for name, p in side.programs.items()}
    temporary = {name: analysis.temp_size_in_bytes for name, analysis in analyses.items()}
    found["resident GB"] = resident / 1e9
    found["temporary GB"] = {name: size / 1e9 for name, size in temporary.items()}
    steps = (temporary[name] for name in ("accumulate", "update"))
    found["peak GB"] = (resident + max(steps)) / 1e9
    if jax.default_backend() == "gpu":
        found["kernels"] = kernels(side)
    return found


def kernels(side: Ours | Plain) -> list[dict[str, Any]]:
    """What a step's kernels take by CUPTI, numbered ones of a name together, the longest first."""
    from kernels import cupti_times  # not above: it sets how JAX takes memory

    groups = collections.defaultdict(list)
    for name, ms in cupti_times(functools.partial(one_step, side)):
        groups[re.sub(r"(_mosaic_gpu)?(_kernel)?([._]\d+)*$", "", name)].append(ms)
    rows = [{"kernel": name, "launches": len(ms), "ms": sum(ms)} for name, ms in groups.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['ms']['step']:.1f} ms a step, {found['tokens/s']:.0f} tokens/s", end="")
    print(f", {found['model TFLOP/s']:.0f} model TFLOP/s, peak {found['peak GB']:.1f} GB", end="")
    print(f" ({found['resident GB']:.1f} from step to step), built in {found['build s']:.0f} s")
    print("  " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in found["ms"].items()))
    print(f"  loss {found['loss']:.6g}, gradient norm {found['gradient norm']:.6g}")
    for row in found.get("kernels", [])[:SHOWN_KERNELS]:
        print(f"  {row['ms']:9.2f} ms {row['launches']:6} {row['kernel'][:90]}")
    print(end="", flush=True)


def run(work: Work, remat: bool, repeats: int, side: type[Ours] | type[Plain]) -> dict[str, Any]:
    """What one side takes, and of ours the comparison of cuts; all its memory is free again afterwards."""
    began = time.perf_counter()
    try:
        built = side(work, remat)
        found: dict[str, Any] = {"build s": time.perf_counter() - began}
        if isinstance(built, Ours):
            found["cuts"] = built.cuts()
            print(f"\nsums of a micro-batch and of its halves: {found['cuts']}", flush=True)
        found |= measure(built, repeats)
        show(f"{side.__name__.lower()}, remat {'on' if remat else 'off'}", found)
    except Exception as problem:  # a side that failed must not cost the others their turn
        found = {"failed": f"{problem!r:.800}"}
        print(found, flush=True)
    return found


def main(
    shape: Shape = Shape.qwen3_8b,
    layers: Annotated[int | None, typer.Option(help="As many as fit the device by default.")] = None,
    micro_batches: Annotated[int, typer.Option(help="Of one step.")] = 4,
    sequences: Annotated[int, typer.Option(help="Of one micro-batch; an even number.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 2048,
    vocab: Annotated[int | None, typer.Option(help="The shape's own by default.")] = None,
    remat: Remat = Remat.off,
    repeats: int = 5,
    out: Path = Path("train-step.json"),
) -> None:
    if sequences % 2 or sequences < 2:
        raise typer.BadParameter(
            f"--sequences {sequences} must be even: a micro-batch is compared with its halves"
        )
    if length <= GRADIENT_ROWS:  # two sequences of a chunk each: a sum of two parts has one order
        raise typer.BadParameter(
            f"--length {length} must be above {GRADIENT_ROWS}, or the control cannot differ"
        )
    raw = SHAPES[shape] | ({"vocab_size": vocab} if vocab else {})
    settings = SETTINGS[remat]
    layers = layers or fitting_layers(raw, sequences * length, all(settings))
    work = Work.drawn(raw | {"num_hidden_layers": layers}, micro_batches, sequences, length)
    backend = backend_of(work.config, jnp.dtype(jnp.bfloat16), None)
    report = {"shape": str(shape), "layers": layers, "vocab": raw["vocab_size"]}
    report |= {"micro-batches": micro_batches, "sequences": sequences, "length": length}
    report |= {"model TFLOP a step": work.flops / 1e12, "runs": []} | environment(backend, "bfloat16")
    print(json.dumps(report, indent=1), flush=True)
    passed = True
    for setting in settings:
        row: dict[str, Any] = {"remat": setting}
        report["runs"].append(row)
        for side in (Ours, Plain):
            row[side.__name__.lower()] = found = run(work, setting, repeats, side)
            gc.collect()
            passed &= "failed" not in found
            if "cuts" in found:
                passed &= found["cuts"]["differ"] == 0 < found["cuts"]["control differs"]
            write_whole(out, json.dumps(report, indent=1) + "\n")
        if "ms" in row["ours"] and "ms" in row["plain"]:
            row["plain / ours"] = row["plain"]["ms"]["step"] / row["ours"]["ms"]["step"]
            print(f"\nremat {'on' if setting else 'off'}: plain / ours {row['plain / ours']:.3f}", flush=True)
            write_whole(out, json.dumps(report, indent=1) + "\n")
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
