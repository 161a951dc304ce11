"""A whole step: its kernels, what each should take on a chip, and their sum.

Kernels follow one another, so their times add up. Nothing is counted for launching them, for the first block of a
kernel, whose fetch nothing hides, or for the host: a step takes longer than this says, a small model's much longer.
"""

import collections
import dataclasses
from types import ModuleType

import jax.numpy as jnp

from jaxdet.engine.memory import page_bytes
from jaxdet.models.config import ModelConfig
from jaxdet.roofline import needed, sm90, tpu
from jaxdet.roofline.chips import Chip
from jaxdet.roofline.kernel import Kernel
from pallas_kernels.numerics import PAGE_SIZE

LABEL = "expected, not measured"
UTILIZATION = 0.9
"""Share of a device's memory that weights and cache may take: the engine's default."""
BACKENDS = {"mosaic_tpu": tpu, "mosaic_gpu": sm90}


@dataclasses.dataclass(frozen=True)
class Decode:
    """One token for each of `rows` sequences, which have `context` tokens each, that one included."""

    rows: int
    context: int
    drawn: bool = False
    """With temperature, top-k and top-p; greedy otherwise."""
    logprobs: bool = False
    """With log-probabilities of the tokens and of the most likely ones."""

    def __str__(self) -> str:
        asked = [name for name in ("drawn", "logprobs") if getattr(self, name)]
        return ", ".join([f"decode {self.rows}", *asked])

    @property
    def tokens(self) -> int:
        return self.rows

    @property
    def sampled(self) -> int:
        return self.rows

    @property
    def pages(self) -> int:
        """Of the KV cache."""
        return self.rows * -(-self.context // PAGE_SIZE)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """One prompt, whole."""

    tokens: int
    drawn = logprobs = False

    def __str__(self) -> str:
        return f"prefill {self.tokens}"

    @property
    def sampled(self) -> int:
        return 1

    @property
    def pages(self) -> int:
        return -(-self.tokens // PAGE_SIZE)


Work = Decode | Prefill


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One kernel on a chip."""

    kernel: Kernel
    chip: Chip

    @property
    def bound(self) -> str:
        """The unit that takes longest: "HBM", "matrix" or "vector"."""
        seconds = self.chip.seconds(self.kernel)
        return max(seconds, key=lambda unit: seconds[unit])

    @property
    def seconds(self) -> float:
        """Of all its calls."""
        return self.kernel.calls * max(self.chip.seconds(self.kernel).values())

    @property
    def matrix_use(self) -> float | None:
        """Share of the matrix unit's work that is no padding; None without products."""
        done = self.chip.matrix_flops(self.kernel)
        return self.kernel.flops / done if done else None


@dataclasses.dataclass(frozen=True)
class Expected:
    """A step on a chip."""

    chip: Chip
    work: Work
    estimates: tuple[Estimate, ...]
    resident: int
    """Bytes of weights and of the cache that the step needs."""

    @property
    def seconds(self) -> float:
        return sum(e.seconds for e in self.estimates)

    @property
    def tokens_per_second(self) -> float:
        return self.work.tokens / self.seconds

    @property
    def fits(self) -> bool:
        """Whether weights and cache fit the share of the chip's HBM that they may take."""
        return self.resident <= UTILIZATION * self.chip.hbm

    @property
    def bound(self) -> str:
        """The unit that most of the time goes to."""
        shares = self.shares
        return max(shares, key=lambda unit: shares[unit])

    @property
    def shares(self) -> dict[str, float]:
        """Share of the time that goes to kernels bound by each unit."""
        total = self.seconds
        return {
            unit: sum(e.seconds for e in self.estimates if e.bound == unit) / total
            for unit in ("HBM", "matrix", "vector")
        }


def expect(config: ModelConfig, work: Work, chip: Chip, dtype="bfloat16") -> Expected:
    """What a step of a model should take on a chip.

    Raises:
        ValueError: the chip's kernels don't take such a model.
    """
    estimates = tuple(Estimate(k, chip) for k in kernels(config, work, BACKENDS[chip.backend], dtype))
    return Expected(chip, work, estimates, resident_bytes(config, work, dtype))


def kernels(config: ModelConfig, work: Work, cut: ModuleType, dtype) -> list[Kernel]:
    """The step's kernels, cut into blocks by one of the modules `tpu`, `sm90` and (not at all) `needed`."""
    c, tokens, size = config, work.tokens, jnp.dtype(dtype).itemsize
    heads = c.num_q_heads * c.head_dim
    qkv = heads + 2 * c.num_kv_heads * c.head_dim
    gemma = c.family == "gemma3"  # norms after each block too, so that the residual is added by XLA
    layer = [
        dataclasses.replace(cut.rms_norm(tokens, c.hidden_size, dtype), calls=(4 if gemma else 2)),
        cut.matmul("qkv", tokens, c.hidden_size, qkv, dtype),
        cut.rope_cache(c, tokens, dtype, scattered=isinstance(work, Decode)),
        cut.matmul("output", tokens, heads, c.hidden_size, dtype, residual=not gemma),
        cut.matmul("gate, up", tokens, c.hidden_size, c.intermediate_size, dtype, halves=2),
        cut.matmul("down", tokens, c.intermediate_size, c.hidden_size, dtype, residual=not gemma),
    ]
    if gemma:
        layer.append(Kernel(name="add", bytes=3 * tokens * c.hidden_size * size, calls=2))
    layer = [dataclasses.replace(k, calls=k.calls * c.num_layers) for k in layer]
    attention = []
    for window, calls in collections.Counter(c.windows).items():
        if isinstance(work, Decode):
            kernel = cut.decode(c, work.rows, work.context, window, dtype)
        else:
            kernel = cut.prefill(c, tokens, window, dtype)
        name = kernel.name if window is None else f"{kernel.name}, window {window}"
        attention.append(dataclasses.replace(kernel, name=name, calls=calls))
    return [
        Kernel(name="embedding", bytes=2 * tokens * c.hidden_size * size),
        *layer[:3],
        *attention,
        *layer[3:],
        dataclasses.replace(cut.rms_norm(tokens, c.hidden_size, dtype), name="last rms_norm"),
        cut.matmul("head", work.sampled, c.hidden_size, c.vocab_size, dtype, out_size=4),
        (cut.draw if work.drawn else cut.sample)(work.sampled, c.vocab_size),
        *(cut.token_logprobs(work.sampled, c.vocab_size) if work.logprobs else ()),
    ]


def resident_bytes(config: ModelConfig, work: Work, dtype) -> int:
    """Weights, and the pages that hold the step's sequences."""
    c, size = config, jnp.dtype(dtype).itemsize
    heads = c.num_q_heads * c.head_dim
    layer = c.hidden_size * (2 * heads + 2 * c.num_kv_heads * c.head_dim + 3 * c.intermediate_size)
    embeddings = (1 if c.tied_embeddings else 2) * c.vocab_size * c.hidden_size
    return (c.num_layers * layer + embeddings) * size + work.pages * page_bytes(c, size)


def needed_work(config: ModelConfig, work: Work, dtype) -> tuple[int, int]:
    """(bytes, operations of products) that a step cannot do without, whatever the device."""
    cut = kernels(config, work, needed, dtype)
    return sum(k.calls * k.bytes for k in cut), sum(k.calls * k.flops for k in cut)
