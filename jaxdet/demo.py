"""`make demo`: a small model answers, and proves that its bits do not move."""

import hashlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from jaxdet.baseline import Baseline
from jaxdet.checkpoints import demo, open_checkpoint
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write a haiku about the sea.",
    "Name three uses of a paper clip.",
)
TOKENS = 24
"""Tokens of the proof's answer."""
CHUNK = 16
COMPANY = 32
MODEL_LEN = 512

Answer = tuple[list[int], np.ndarray]
"""Token ids and the logits that chose them, float32 [tokens, vocab]."""


def run_demo(console: Console) -> bool:
    """Answers some prompts, then computes one answer in several ways; returns whether all bits agreed."""
    began = time.monotonic()
    llm = LLM(demo.NAME, max_model_len=MODEL_LEN, keep_logits=True)
    console.print(f"[bold]{llm.name}[/bold] in {llm.dtype}, greedy\n")
    for prompt in PROMPTS:
        console.print(f"[bold cyan]> {prompt}")
        params = SamplingParams(temperature=0, max_tokens=48)
        with Live(
            Text("compiling for this machine…" if began else "…"), console=console, refresh_per_second=10
        ) as live:
            for output in llm.stream(llm.chat_prompt([{"role": "user", "content": prompt}]), params):
                if began:
                    console.print(f"[dim](first token after {time.monotonic() - began:.1f} s)")
                    began = 0.0
                live.update(Text(output.outputs[0].text.strip()))
        console.print()

    ids = llm.chat_prompt([{"role": "user", "content": PROMPTS[0]}])["prompt_token_ids"]
    company = [[*ids[: 5 + i], 300 + i] for i in range(COMPANY)]
    plain = Baseline(open_checkpoint(demo.NAME), dtype=llm.dtype, max_model_len=MODEL_LEN)
    ways: dict[str, dict[str, Answer]] = {}
    runs = {"jaxdet": _ours(llm, ids, company), "plain jax.jit": _plain(plain, ids, company)}
    with tqdm(total=6, desc="Proving it", unit="run") as bar:
        for engine, answers in runs.items():
            ways[engine] = {}
            for way, answer in answers:
                ways[engine][way] = answer
                bar.update()
    differing = {engine: _differing(answers) for engine, answers in ways.items()}
    console.print(_table(ways, differing))
    if same := not any(differing["jaxdet"].values()):
        console.print("[bold green]jaxdet: the same bits every time.")
    else:
        console.print("[bold red]jaxdet: bits moved. Please report this with `jaxdet verify smollm2-135m`.")
    if not any(differing["plain jax.jit"].values()):
        console.print("Plain JAX happened to agree with itself on this machine.")
    return same


def _ours(llm: LLM, ids: list[int], company: Sequence[list[int]]) -> Iterator[tuple[str, Answer]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

    def answer(prompts: Sequence[list[int]]) -> Answer:
        sequences = [llm.engine.add(prompt, params)[0] for prompt in prompts]
        while llm.engine.has_work:
            llm.engine.step()
        mine = sequences[len(prompts) // 2]
        return mine.output, np.stack(mine.logits)

    yield "alone", answer([ids])
    yield f"in a batch of {COMPANY + 1}", answer([*company[: COMPANY // 2], ids, *company[COMPANY // 2 :]])
    llm.engine.scheduler.max_num_batched_tokens = CHUNK
    yield f"in chunks of {CHUNK} tokens", answer([ids])


def _plain(plain: Baseline, ids: list[int], company: Sequence[list[int]]) -> Iterator[tuple[str, Answer]]:
    yield "alone", plain.generate([ids], TOKENS)[0]
    batch = [*company[: COMPANY // 2], ids, *company[COMPANY // 2 :]]
    yield f"in a batch of {COMPANY + 1}", plain.generate(batch, TOKENS)[COMPANY // 2]
    yield f"in chunks of {CHUNK} tokens", plain.generate([ids], TOKENS, chunk=CHUNK)[0]


def _differing(answers: dict[str, Answer]) -> dict[str, int]:
    """Per way, the logits whose bits differ from those of the prompt alone (all of them if token ids differ)."""
    tokens, logits = answers["alone"]
    return {
        way: logits.size
        if found[0] != tokens
        else int((found[1].view(np.uint32) != logits.view(np.uint32)).sum())
        for way, found in answers.items()
    }


def _table(ways: dict[str, dict[str, Answer]], differing: dict[str, dict[str, int]]) -> Table:
    size = ways["jaxdet"]["alone"][1].size
    title = f"“{PROMPTS[0]}”, {TOKENS} greedy tokens, all {size:,} logits"
    table = Table("", "token ids", "logits", title=title, title_justify="left")
    table.add_column("differ", justify="right")
    for engine, answers in ways.items():
        for way, (tokens, logits) in answers.items():
            moved = differing[engine][way]
            count = Text(f"{moved:,}", style="red" if moved else "green")
            table.add_row(f"{engine} {way}", _digest(np.array(tokens, np.int32)), _digest(logits), count)
        table.add_section()
    return table


def _digest(values: np.ndarray) -> str:
    """The first 12 hex digits of SHA-256."""
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()[:12]
