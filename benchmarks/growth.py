"""How the engine's speed grows with batch and context, what the host adds to a step, and memory beside its plan.

    python benchmarks/growth.py OUT [--layers 36] [--small]

Qwen3-8B's shape with random weights in bfloat16; needs a GPU with about 110 GB. `--small` takes a tiny model and short
contexts instead, on any machine. One engine for everything, with as many steps a dispatch as `LLM` takes and the cache
that `plan_pages` gives it. Writes OUT/growth.json after every row, and OUT/growth.png.

A row is so many sequences that decode greedily, TOKENS tokens each around the given context, measured from the end of
one dispatch to the end of a later one. They begin with one token, or with a prefix that is in the cache and one token
more, so that no prefill is in the row and every batch costs one program. Nothing is compiled while it is measured.

- step ms: wall time of a step in the engine: scheduler, arrays, dispatch, sampling, tokens handed out.
- device ms: wall time of the same step in a row of calls of nothing but its compiled program, with the engine's last
  inputs, already on the device. The device always has the next call then, so that it is the device's pace; gaps between
  the program's own kernels are in it.
- host overhead: 1 − device / step, which is what the host costs in throughput. The host works one step ahead, so that
  most of what it does is hidden.
- host CPU ms: CPU time of the engine's thread a step, hidden or not. Waiting sleeps; where it spins, it counts.
- limit: tokens a second, were weights and cache read once a step at the rate at which the card reads a large array, or
  the products taken at the rate that it holds for a second of large ones, both measured here.

Memory: the most that JAX's pool held, after the largest step there is, over weights + cache + what `plan_pages` keeps
free for steps. Beside it what the largest program holds of its own.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import serve_offline  # before `kernels`, which would have JAX take its memory bit by bit
import typer
from kernels import ceilings, wall_us

from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.engine.engine import Engine
from jaxdet.engine.memory import page_bytes, step_bytes
from jaxdet.engine.sequence import Sequence
from jaxdet.llm import steps_at_once
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import COMMON, FAMILIES, QWEN3_8B, random_model
from jaxdet.verify.report import environment
from pallas_kernels.numerics import PAGE_SIZE

TOKENS = 64
"""Tokens of each sequence that a row measures."""
WARM_UP = 16
"""Tokens that each samples before, at least."""
ROUNDS = 3
"""Measurements at batch 1, whose medians count: the host's share is a small difference there."""
GREEDY = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    config: dict[str, Any]
    batches: tuple[int, ...]
    context: int
    """Of the rows that differ in batch."""
    contexts: tuple[int, ...]
    """The last one in whole steps of prefill."""
    wide: int
    """Sequences of the second row of each context; the first has one."""
    max_model_len: int
    max_num_batched_tokens: int


FULL = Sizes(QWEN3_8B, (1, 4, 16, 64, 256, 1024), 200, (128, 1024, 4096, 16384, 32768), 8, 33024, 8192)
SMALL = Sizes(
    COMMON | {"model_type": "qwen3"} | FAMILIES["qwen3"], (1, 4, 16), 200, (128, 512, 1024), 4, 1536, 512
)


class Bench:
    """One engine and what runs on it."""

    def __init__(self, sizes: Sizes):
        self.sizes, self.rng = sizes, np.random.default_rng(0)
        model = random_model(
            sizes.config, dtype=jnp.bfloat16, backend=None, max_model_len=sizes.max_model_len
        )
        self.steps = steps_at_once(model)
        self.engine = Engine(
            model,
            salt="",
            max_model_len=sizes.max_model_len,
            max_num_seqs=sizes.batches[-1],
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            num_scheduler_steps=self.steps,
        )

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return self.rng.integers(0, self.sizes.config["vocab_size"], (count, length)).tolist()

    def begin(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Sequence]:
        return [sequence for prompt in prompts for sequence in self.engine.add(prompt, params)]

    def end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self.engine.abort(sequence)

    def remember(self, prompts: list[list[int]]) -> None:
        """Fills the cache with prompts, to be found as prefixes."""
        self.begin(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        while self.engine.has_work:
            self.engine.step()

    def row(self, prefixes: list[list[int]], context: int) -> dict[str, Any]:
        """What decoding at a context takes, of sequences that begin with as much of a prefix as they can."""
        batch = len(prefixes)
        rounds = [self.round(prefixes, context) for _ in range(ROUNDS if batch == 1 else 1)]
        wall, cpu, device = np.median(rounds, axis=0).tolist()
        return {
            "batch": batch,
            "context": context,
            "tokens/s": batch / wall,
            "step ms": wall * 1e3,
            "device ms": device * 1e3,
            "host overhead": 1 - device / wall,
            "host CPU ms": cpu * 1e3,
            "rounds": [[1e3 * seconds for seconds in each] for each in rounds],
        }

    def round(self, prefixes: list[list[int]], context: int) -> tuple[float, float, float]:
        """Seconds of a step: in the engine, of its thread's CPU, and on the device."""
        first = context - TOKENS // 2
        start = max(first - WARM_UP, 0) // PAGE_SIZE * PAGE_SIZE
        ends = self.prompts(len(prefixes), 1)
        sequences = self.begin([[*p[:start], *end] for p, end in zip(prefixes, ends, strict=True)])
        while len(sequences[0].tokens) < first - 2 * self.steps:  # `in_the_engine` takes two dispatches more
            assert sequences[0].finish_reason is None
            self.engine.step()
        wall, cpu = self.in_the_engine(len(sequences))
        device = self.on_the_device()
        self.end(sequences)
        return wall, cpu, device

    def in_the_engine(self, batch: int) -> tuple[float, float]:
        """Seconds of a step, on the wall and of this thread's CPU."""
        engine = self.engine
        for _ in range(2):  # a step has just begun then, and none is ready
            engine.step()
        before = engine.stats()
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(TOKENS // self.steps):
            engine.step()
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        after = engine.stats()
        assert after.output_tokens - before.output_tokens == batch * TOKENS
        assert (after.steps - before.steps, after.compiled_programs) == (TOKENS, before.compiled_programs)
        return wall / TOKENS, cpu / TOKENS

    def on_the_device(self) -> float:
        """Seconds of the step that the engine would run next, in a row of them without the engine."""
        engine, seen = self.engine, []
        step: Any = engine.step_fn
        programs = step._programs
        step._programs = {key: _noting(program, seen) for key, program in programs.items()}
        try:
            engine.step()
        finally:
            step._programs = programs
        (program, (weights, _, _, told)), *others = seen  # the cache and the last tokens were donated
        told, others = jax.device_put(told), [(draw, jax.device_put(args[-1])) for draw, args in others]

        def call() -> jax.Array:
            inputs = weights, engine._cache, engine._last_tokens, told
            if self.steps > 1:
                tokens, _, engine._last_tokens, engine._cache = program(*inputs)
            else:
                ((draw, drawn),) = others
                _, logits, engine._cache = program(*inputs)
                tokens, _, engine._last_tokens = draw(logits, engine._last_tokens, drawn)
            return tokens

        first, last, count = call(), call(), TOKENS // self.steps
        jax.block_until_ready(first)
        began = time.perf_counter()
        for _ in range(count - 1):
            last = call()
        jax.block_until_ready(last)
        return (time.perf_counter() - began) / TOKENS

    def memory(self) -> dict[str, Any]:
        """The largest step, and what it and all before took."""
        engine, tokens = self.engine, self.sizes.max_num_batched_tokens
        count, largest = tokens // PAGE_SIZE, engine.buckets.all()[0]
        rows = self.begin(self.prompts(min(largest.rows, self.sizes.batches[-1] - count), 1))
        while not rows[-1].num_output:
            engine.step()
        prompts = self.begin(self.prompts(count, PAGE_SIZE))
        while not prompts[-1].num_output:
            engine.step()
        self.end(rows + prompts)
        programs = engine.step_fn.programs.items()
        assert any(name == "model" and key[0] == (largest.rows + tokens,) for (name, key), _ in programs)
        config, itemsize = engine.step_fn.config, engine.step_fn.dtype.itemsize
        weights = sum(x.nbytes for x in jax.tree.leaves(engine.step_fn.state))
        cache = engine.pool.num_pages * page_bytes(config, itemsize)
        reserved = step_bytes(config, engine.buckets, itemsize, engine._table, engine.step_fn.backend)
        own = [
            m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            for _, program in programs
            if (m := program.memory_analysis())
        ]
        peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        plan = weights + cache + reserved
        return {
            "weights GB": weights / 1e9,
            "cache GB": cache / 1e9,
            "kept free for steps GB": reserved / 1e9,
            "largest program's own GB": max(own, default=0) / 1e9,
            "plan GB": plan / 1e9,
            "peak GB": peak and peak / 1e9,
            "peak / plan": peak and peak / plan,
        }


def _noting(program, seen: list):
    """A program that notes itself and its arguments."""

    def call(*arguments):
        seen.append((program, arguments))
        return program(*arguments)

    return call


def wall_ceilings() -> tuple[float, float]:
    """`ceilings` by wall time, where there is no CUPTI."""
    big, square = jnp.ones((2**12, 2**13), jnp.bfloat16), jnp.ones((1024, 1024), jnp.bfloat16)
    reading = wall_us(jax.jit(lambda x: jnp.max(x, axis=1)), [big], 5)
    return big.nbytes / reading, 2 * 1024**3 / wall_us(jax.jit(jnp.dot), [square, square], 5)


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens a second against batch and against context; dashed the limits, numbers are shares of them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    by_context = report["by context"]
    series = {batch: [r for r in by_context if r["batch"] == batch] for batch in (1, report["wide"])}
    panels = (
        (axes[0], "batch", f"at {report['context']} tokens of context", {"jaxdet": report["by batch"]}),
        (axes[1], "context", "by length of context", {f"batch {b}": rows for b, rows in series.items()}),
    )
    for axis, x, title, lines in panels:
        for color, (label, rows) in zip(("#1f6f8b", "#c0392b"), lines.items(), strict=False):
            at, rate, limit = ([row[name] for row in rows] for name in (x, "tokens/s", "limit"))
            axis.plot(at, rate, "o-", color=color, label=label)
            axis.plot(at, limit, "x--", color=color, alpha=0.6, label=f"limit of {label}")
            for place in zip(at, rate, limit, strict=True):
                share = f"{place[1] / place[2]:.0%}"
                axis.annotate(share, place[:2], (0, -14), textcoords="offset points", ha="center", fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted({row[x] for rows in lines.values() for row in rows}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.margins(y=0.12)
        axis.set(title=title, xlabel=x, ylabel="tokens/s")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"{report['model']}, {report['layers']} layers, bfloat16, on {report['device']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Path,
    layers: Annotated[int | None, typer.Option(help="The model's own number by default.")] = None,
    small: Annotated[bool, typer.Option(help="A tiny model, short contexts, any machine.")] = False,
) -> None:
    if not small and jax.default_backend() != "gpu":
        raise SystemExit("growth.py needs a GPU without --small")
    out.mkdir(parents=True, exist_ok=True)
    began, sizes = time.perf_counter(), SMALL if small else FULL
    layers = layers or sizes.config["num_hidden_layers"]
    sizes = dataclasses.replace(sizes, config=sizes.config | {"num_hidden_layers": layers})
    use_compile_cache()
    rates = ceilings() if jax.default_backend() == "gpu" else wall_ceilings()
    reading, flops = (1e6 * x for x in rates)
    bench = Bench(sizes)
    report: dict[str, Any] = environment(bench.engine.step_fn.backend, "bfloat16") | {
        "model": "tiny" if small else "Qwen3-8B's shape",
        "layers": layers,
        "context": sizes.context,
        "wide": sizes.wide,
        "pages": bench.engine.pool.num_pages,
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": sizes.batches[-1],
        "steps a dispatch": bench.steps,
        "reading TB/s": reading / 1e12,
        "dot TFLOP/s": flops / 1e12,
        "by batch": [],
        "by context": [],
        "failed": [],
    }

    def show(row: dict[str, Any]) -> None:
        shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        print(json.dumps(shown | {"at s": round(time.perf_counter() - began)}), flush=True)
        (out / "growth.json").write_text(json.dumps(report, indent=1) + "\n")

    def measure(rows: list[dict[str, Any]], prefixes: list[list[int]], context: int) -> None:
        try:
            row = bench.row(prefixes, context)
        except Exception as problem:  # a row that fails must not cost the others their turn
            row = {"batch": len(prefixes), "context": context, "failed": f"{problem!r:.800}"}
            report["failed"].append(row)
            bench.end([*bench.engine.scheduler.running, *bench.engine.scheduler.waiting])
            return show(row)
        least = serve_offline.decode_limit(sizes.config, row["batch"], context, reading, flops)
        row["limit"] = row["batch"] / least
        row["of limit"] = row["tokens/s"] / row["limit"]
        rows.append(row)
        show({k: v for k, v in row.items() if k != "rounds"})

    show(report)
    for batch in sizes.batches:
        measure(report["by batch"], [[]] * batch, sizes.context)
    long = bench.prompts(sizes.wide, sizes.contexts[-1])
    bench.remember(long)
    for context in sizes.contexts:
        for batch in (1, sizes.wide):
            measure(report["by context"], long[:batch], context)
    plot(report, out / "growth.png")
    report["memory"] = bench.memory()
    report["compiled programs"] = bench.engine.stats().compiled_programs
    show(report["memory"])
    if report["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
