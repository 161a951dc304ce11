"""Steps of the engine measured, beside what the roofline expects of the chip."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxdet.checkpoints import open_checkpoint
from jaxdet.llm import LLM
from jaxdet.models.registry import family_of
from jaxdet.roofline.chips import CHIPS, Chip, chip_of
from jaxdet.roofline.step import LABEL, Decode, Prefill, Work, expect, needed_work
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.numerics import PAGE_SIZE

PROMPT, STEPS, ROUNDS = 64, 16, 5
WARM_UP = 2
LONGEST = PROMPT + WARM_UP + ROUNDS * STEPS + 2
"""Tokens of a decoding sequence at the end; one step more is under way."""
CONTEXT = PROMPT + WARM_UP + ROUNDS * STEPS // 2
"""Tokens of a decoding sequence in the middle of what is timed."""
LOGPROBS = 5
"""Most likely tokens, where log-probabilities are asked for."""


def decodes(batches: Sequence[int]) -> list[Decode]:
    """Of each batch greedy steps, drawn ones, and greedy ones with log-probabilities."""
    asked = ((False, False), (True, False), (False, True))
    return [Decode(batch, CONTEXT, drawn, logprobs) for batch in batches for drawn, logprobs in asked]


def measure(model: str, batches: Sequence[int]) -> list[dict[str, Any]]:
    """Times decode steps of each batch and one prefill on the default device, with random prompts.

    Returns:
        Per workload the medians of ROUNDS rounds, the bytes and operations a second that the device reached (of those
        which no implementation does without), and what the roofline expects, where it knows the device's kernels.

    Raises:
        ValueError: the model takes too few tokens.
    """
    on_cpu = jax.default_backend() == "cpu"
    checkpoint = open_checkpoint(model, check_config=family_of)
    limit = family_of(checkpoint.config).read_config(checkpoint.config).max_position
    if limit < LONGEST:
        raise ValueError(f"bench runs sequences of {LONGEST} tokens but {model} takes {limit}; use another")
    prompt = min(512 if on_cpu else 2048, limit - 1)
    longest = max(LONGEST, prompt + 1)
    llm = LLM(
        model,
        max_num_seqs=max(batches),
        max_num_batched_tokens=prompt,
        max_model_len=longest,
        num_pages=1 + max(max(batches) * -(-LONGEST // PAGE_SIZE), -(-longest // PAGE_SIZE)),
        enable_prefix_caching=False,
        compile_at_start=False,
    )
    rng = np.random.default_rng(0)
    found: list[tuple[Work, float]] = [(work, _decode_seconds(llm, work, rng)) for work in decodes(batches)]
    found.append((Prefill(prompt), _prefill_seconds(llm, prompt, rng)))
    step = llm.engine.step_fn
    chip = chip_of(jax.devices()[0].device_kind)
    if chip is not None and chip.backend != step.backend:
        chip = None
    return [_row(step.config, work, chip, llm.dtype, seconds) for work, seconds in found]


def expected(model: str, batches: Sequence[int], platform: str) -> list[dict[str, Any]]:
    """What the roofline expects, in bfloat16, of every chip of a platform ("tpu" or "gpu")."""
    checkpoint = open_checkpoint(model, check_config=family_of)
    config = family_of(checkpoint.config).read_config(checkpoint.config)
    works = [*decodes(batches), Prefill(min(2048, config.max_position - 1))]
    chips = [chip for chip in CHIPS if chip.platform == platform]
    return [_row(config, work, chip, "bfloat16", None) for chip in chips for work in works]


def render(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `measure` or `expected` for a terminal; columns that no row fills are left out."""
    columns = {
        "device": lambda r: r["device"],
        "workload": lambda r: r["workload"],
        "measured ms": lambda r: f"{r['measured_ms']:,.4g}",
        "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "GB/s": lambda r: f"{r['bytes_per_second'] / 1e9:.1f}",
        "GFLOP/s": lambda r: f"{r['flops_per_second'] / 1e9:.1f}",
        "expected ms": lambda r: f"{r['expected_ms']:,.4g}",
        "expected tokens/s": lambda r: f"{r['expected_tokens_per_second']:,.0f}",
        "bound by": lambda r: r["expected_bound"] + ("" if r["fits"] else "; does not fit its memory"),
        "measured / expected": lambda r: f"{r['measured_ms'] / r['expected_ms']:.2f}",
    }
    measured, known = rows[0]["measured_ms"] is not None, "expected_ms" in rows[0]
    wanted = {"device": True, "workload": True, "measured / expected": measured and known}
    wanted |= dict.fromkeys(("measured ms", "tokens/s", "GB/s", "GFLOP/s"), measured)
    wanted |= dict.fromkeys(("expected ms", "expected tokens/s", "bound by"), known)
    table = Table(
        title=rows[0]["dtype"] + (f"; columns that say so are {LABEL}" if known else ""), title_justify="left"
    )
    shown = [name for name in columns if wanted[name]]
    for name in shown:
        table.add_column(name, justify="left" if name in ("device", "workload", "bound by") else "right")
    for row in rows:
        table.add_row(*(columns[name](row) for name in shown))
    return table


def _row(config, work: Work, chip: Chip | None, dtype: str, seconds: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "workload": str(work),
        "device": jax.devices()[0].device_kind if chip is None else chip.name,
        "dtype": dtype,
        "measured_ms": None,
    }
    if seconds is not None:
        moved, operations = needed_work(config, work, dtype)
        row |= {
            "measured_ms": seconds * 1e3,
            "tokens_per_second": work.tokens / seconds,
            "bytes_per_second": moved / seconds,
            "flops_per_second": operations / seconds,
        }
    if chip is not None:
        estimate = expect(config, work, chip, dtype)
        row |= {
            "expected_ms": estimate.seconds * 1e3,
            "expected_tokens_per_second": estimate.tokens_per_second,
            "expected_bound": estimate.bound,
            "fits": estimate.fits,
            "expected_is": LABEL,
        }
    return row


def _decode_seconds(llm: LLM, work: Decode, rng) -> float:
    """Of one step with that many running sequences, scheduler, sampler and host included."""
    engine, vocab = llm.engine, llm.engine.vocab_size
    params = SamplingParams(
        temperature=0.8 if work.drawn else 0,
        top_k=50 if work.drawn else 0,
        top_p=0.95 if work.drawn else 1,
        seed=1,
        logprobs=LOGPROBS if work.logprobs else None,
        max_tokens=LONGEST - PROMPT,
        ignore_eos=True,
    )
    prompts = rng.integers(0, vocab, (work.rows, PROMPT)).tolist()
    sequences = [s for prompt in prompts for s in engine.add(prompt, params)]
    while any(s.num_output < WARM_UP for s in sequences):
        engine.step()

    def round_seconds() -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        return (time.perf_counter() - began) / STEPS

    seconds = statistics.median(round_seconds() for _ in range(ROUNDS))
    for sequence in sequences:
        engine.abort(sequence)
    return seconds


def _prefill_seconds(llm: LLM, tokens: int, rng) -> float:
    """From the prompt to its first token."""
    engine, vocab = llm.engine, llm.engine.vocab_size
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def round_seconds() -> float:
        (sequence,) = engine.add(rng.integers(0, vocab, tokens).tolist(), params)
        began = time.perf_counter()
        while sequence.finish_reason is None:
            engine.step()
        return time.perf_counter() - began

    round_seconds()  # compiles
    return statistics.median(round_seconds() for _ in range(ROUNDS))
