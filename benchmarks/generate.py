"""jaxdet beside plain jitted JAX in one process: decode at several batch sizes, prefill of 512 tokens.

    python benchmarks/generate.py [MODEL] [--dtype float32] [--backend NAME] [--rounds 7] [--row-tiles] [--out out]

Both run the same model, greedily, with a cache of the same dtype, and hand every token to the host. Plain JAX attends
to its whole static cache, so it gets one no longer than the longest sequence needs. jaxdet's figure is the whole
engine: scheduler, paged cache, sampler, stop conditions. Rounds alternate between the two, so that what else the
machine does hits both; the ratio is the median of the rounds' ratios. Writes JSON and a PNG.
"""

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from jaxdet import LLM, SamplingParams
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.verify.report import environment
from pallas_kernels import backend as backends

BATCHES = (1, 8, 32)
PROMPT, STEPS, PREFILL = 64, 16, 512
MODEL_LEN = 1024
TARGETS = {
    "decode, batch 1": 0.9,
    "decode, batch 8": 1.0,
    "decode, batch 32": 1.0,
    "prefill, 512 tokens": 0.9,
}


@contextlib.contextmanager
def decode_ours(llm: LLM, batch: int, rng) -> Iterator[Callable[[], float]]:
    """A function that times STEPS decode steps of `batch` running sequences, in seconds a step."""
    params = SamplingParams(temperature=0, max_tokens=MODEL_LEN, ignore_eos=True)
    engine = llm.engine
    sequences = [s for p in rng.integers(0, 1000, (batch, PROMPT)) for s in engine.add(p.tolist(), params)]
    while any(s.num_output < 2 for s in sequences):
        engine.step()

    def run() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        return (time.perf_counter() - began) / STEPS

    yield run
    for sequence in sequences:
        engine.abort(sequence)


def decode_plain(plain: Baseline, batch: int, rng) -> Callable[[], float]:
    """The same for the static cache, one jitted call and one host read a step."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, cache, tokens, at):
        logits, cache = plain.forward(params, cache, tokens[:, None], at)
        return logits[:, -1].argmax(-1), cache

    start = np.zeros(batch, np.int32)
    prompts = rng.integers(0, 1000, (batch, PROMPT)).astype(np.int32)
    logits, cache = plain.forward(plain.params, plain.new_cache(batch), prompts, start, start + PROMPT - 1)
    state = {"tokens": logits.argmax(-1), "cache": cache, "at": PROMPT}

    def run() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            at = jnp.full(batch, state["at"], jnp.int32)
            state["tokens"], state["cache"] = step(plain.params, state["cache"], state["tokens"], at)
            np.asarray(state["tokens"])
            state["at"] += 1
        return (time.perf_counter() - began) / STEPS

    run()
    return run


def prefill_ours(llm: LLM, rng) -> Callable[[], float]:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def run() -> float:
        (sequence,) = llm.engine.add(rng.integers(0, 1000, PREFILL).tolist(), params)
        began = time.perf_counter()
        while sequence.finish_reason is None:
            llm.engine.step()
        return time.perf_counter() - began

    run()
    return run


def prefill_plain(plain: Baseline, rng) -> Callable[[], float]:
    cache = plain.new_cache(1)
    state = {"cache": cache}

    def run() -> float:
        tokens = rng.integers(0, 1000, (1, PREFILL)).astype(np.int32)
        start = np.zeros(1, np.int32)
        began = time.perf_counter()
        logits, state["cache"] = plain.forward(
            plain.params, state["cache"], tokens, start, start + PREFILL - 1
        )
        np.asarray(logits.argmax(-1))
        return time.perf_counter() - began

    run()
    return run


def measure(ours: Callable[[], float], plain: Callable[[], float], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, and the ratio of speeds with its extremes; above 1 jaxdet is faster."""
    pairs = [(ours(), plain()) for _ in range(rounds)]
    ratios = [theirs / mine for mine, theirs in pairs]
    return {
        "jaxdet_ms": statistics.median(mine for mine, _ in pairs) * 1e3,
        "plain_ms": statistics.median(theirs for _, theirs in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main(
    model: Annotated[str, typer.Argument()] = "smollm2-135m",
    dtype: str = "float32",
    backend: Annotated[str | None, typer.Option(help="The device's own by default.")] = None,
    rounds: int = 7,
    row_tiles: Annotated[
        bool, typer.Option(help="As on CPUs whose dots aren't proven free of the row count.")
    ] = False,
    out: Path = Path("out"),
) -> None:
    """Measures, prints a table, writes OUT/generate.json and OUT/generate.png."""
    console, rng = Console(), np.random.default_rng(0)
    if row_tiles:
        backends.ROW_FREE_ISAS = frozenset()
    llm = LLM(
        model,
        dtype=dtype,
        backend=backend,
        max_model_len=MODEL_LEN,
        max_num_seqs=32,
        enable_prefix_caching=False,
    )
    rows: dict[str, dict[str, float]] = {}
    checkpoint = open_checkpoint(model)
    with console.status("measuring"):
        # Plain JAX attends to its whole cache, so its cache is no longer than the longest sequence needs.
        plain = Baseline(checkpoint, dtype=dtype, max_model_len=PROMPT + (rounds + 2) * STEPS)
        for batch in BATCHES:
            with decode_ours(llm, batch, rng) as ours:
                rows[f"decode, batch {batch}"] = measure(ours, decode_plain(plain, batch, rng), rounds)
        plain = Baseline(checkpoint, dtype=dtype, max_model_len=PREFILL)
        rows[f"prefill, {PREFILL} tokens"] = measure(
            prefill_ours(llm, rng), prefill_plain(plain, rng), rounds
        )
    report(
        rows,
        out,
        environment(llm.engine.step_fn.backend, dtype) | {"model": llm.name, "row_tiles": row_tiles},
        console,
    )


def report(rows: dict[str, dict[str, float]], out: Path, where: dict, console: Console) -> None:
    table = Table("workload", "jaxdet ms", "plain JAX ms", "jaxdet / plain speed", "target")
    for name, row in rows.items():
        met = "" if row["ratio"] >= TARGETS[name] else "[red]"
        table.add_row(
            name,
            f"{row['jaxdet_ms']:.1f}",
            f"{row['plain_ms']:.1f}",
            f"{met}{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})",
            f"≥ {TARGETS[name]}",
        )
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "generate.json").write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    place = np.arange(len(rows))
    for shift, key, label in ((-0.2, "plain_ms", "plain jax.jit"), (0.2, "jaxdet_ms", "jaxdet")):
        bars = axes.bar(place + shift, [row[key] for row in rows.values()], 0.4, label=label)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(place, rows.keys())
    axes.set_ylabel("ms a step (lower is better)")
    axes.set_title(
        f"{where['model']}, {where['dtype']}, {where['device']}, {where['cpus']} cores", fontsize=10
    )
    axes.legend()
    figure.savefig(out / "generate.png", dpi=120)
    console.print(f"wrote {out}/generate.json and {out}/generate.png")


if __name__ == "__main__":
    typer.run(main)
