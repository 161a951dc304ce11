"""Thousands of random requests through engines under pressure; every bit compared with an undisturbed run.

    python benchmarks/soak.py MODEL [--requests 5000] [--seed 0] [--dtype bfloat16] [--backend mosaic_gpu] [--alone 200]

MODEL is what `LLM` takes, or "qwen3-8b-shape" (random weights). The requests come in three rounds: without guesses,
with n-gram guesses, and with guesses of a small random model. In each round they arrive at random steps, share
prefixes, differ in length, sampling parameters and priority, some are cancelled, some hold a token whose embedding is
NaN, and the page pool is kept so small that sequences are preempted all the time.

Token ids, log-probabilities (of the chosen token, the most likely ones and the prompt's) and finish reasons must equal
those of a reference. What the reference is: running each of thousands of requests alone would take hours, so all are
compared with a second engine (everything at once, in the opposite order, other chunks, plenty of pages, no prefix
cache, no guesses, no priorities, nothing cancelled), and `--alone` of them, drawn at random, with a fresh engine that
runs nothing else. A fault that both engines shared would have to show in that sample. With `--alone` as large as
`--requests` nothing is left to chance.

Prints one line of JSON; the exit status is 1 if a bit differed or a round did not show what it should have.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxdet.checkpoints import open_checkpoint
from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.engine.drafting import ModelDrafter
from jaxdet.engine.engine import Engine
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Step
from jaxdet.models.layers import DecoderLM
from jaxdet.models.registry import build_model
from jaxdet.sampling_params import SamplingParams
from jaxdet.testing import QWEN3_8B, random_model
from jaxdet.verify.report import environment
from pallas_kernels.matmul import op as matmul_op
from pallas_kernels.numerics import PAGE_SIZE

ROUNDS = ("none", "ngram", "model")
"""Who guesses."""
TOP = 3
"""Log-probabilities of so many likely tokens are compared beside the chosen one's."""


class Job(NamedTuple):
    """A request, when it arrives, and when somebody loses patience."""

    prompt: list[int]
    params: SamplingParams
    arrival: int
    """Step of the engine."""
    cancelled_after: int | None
    """Steps from its arrival."""
    priority: int


class Answer(NamedTuple):
    """What must not change by a bit."""

    finish_reason: str | None
    values: tuple[np.ndarray, ...]
    """Per output token: ids, log-probabilities, ranks, likely tokens."""
    prompt_logprobs: np.ndarray


def traffic(count: int, *, seed: int, max_len: int, poison: int, rate: float) -> list[Job]:
    """Random jobs of tokens below `poison`, about `rate` of them a step; some prompts hold `poison`, too.

    Half of these come with a twin without it, in the same step: it may share what is before the poison, but no NaN.
    """
    rng = np.random.default_rng(seed)
    tokens = lambda n: rng.integers(0, poison, int(n)).tolist()  # noqa: E731
    pages = max(1, 5 * max_len // 8 // PAGE_SIZE)
    shared = [tokens(pages * PAGE_SIZE + rng.integers(1, 20)) for _ in range(2)]
    prompts: list[list[int]] = []
    jobs, twin = [], None
    for arrival in np.floor(np.cumsum(rng.exponential(1 / rate, count))).astype(int).tolist():
        if twin is not None:
            prompt, step = twin
            jobs.append(Job(prompt, _params(rng, poison), step, None, 0))
            twin = None
            continue
        kind = rng.random()
        if kind < 0.8:
            prompt = [*shared[rng.integers(len(shared))], *tokens(rng.integers(1, max_len // 8))]
        elif kind < 0.9 and prompts:
            prompt = list(prompts[rng.integers(len(prompts))])
        elif kind < 0.95:
            prompt = tokens(rng.integers(2, 9)) * int(rng.integers(3, 8))
        else:
            prompt = tokens(rng.integers(1, max_len // 2))
        if rng.random() < 0.5:  # the output needs another page
            prompt += tokens(max(0, -len(prompt) % PAGE_SIZE - int(rng.integers(-1, 6))))
        del prompt[3 * max_len // 4 :]
        prompts.append(list(prompt))
        if rng.random() < 0.1:
            twin = (list(prompt), arrival) if rng.random() < 0.5 else None
            prompt.insert(int(rng.integers(len(prompt) + 1)), poison)
        patience = int(rng.integers(0, 60)) if rng.random() < 0.12 else None
        jobs.append(Job(prompt, _params(rng, poison), arrival, patience, int(rng.choice([0, 0, 0, -1, 2]))))
    return jobs


def _params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0},
        {"temperature": 0, "ignore_eos": True, "min_tokens": 1},
        {"temperature": float(rng.uniform(0.1, 1.5)), "seed": int(rng.integers(2**63))},
        {"temperature": 0.8, "top_p": float(rng.uniform(0.3, 1)), "seed": int(rng.integers(4))},
        {"temperature": 1.2, "top_k": int(rng.integers(1, 50)), "min_p": 0.01},
        {"temperature": 0.7, "frequency_penalty": 0.6, "presence_penalty": -0.2},
        {"temperature": 0, "repetition_penalty": float(rng.uniform(0.8, 1.3))},
        {"temperature": 0.5, "logit_bias": {int(t): 2.0 for t in rng.integers(0, vocab, 5)}},
        {"temperature": 0.2, "stop_token_ids": rng.integers(0, vocab, vocab // 20).tolist()},
    )
    fields = kinds[rng.integers(len(kinds))]
    asked = {"prompt_logprobs": 1} if rng.random() < 0.05 else {}
    samples = 2 if rng.random() < 0.05 else 1
    return SamplingParams(
        n=samples, max_tokens=int(rng.integers(1, 25)), logprobs=TOP, **({"min_tokens": 0} | fields | asked)
    )


@dataclasses.dataclass
class Engines:
    """Engines of one model that share compiled programs.

    Args:
        step: the model's programs.
        small: those of a model that guesses.
        limits: arguments of `Engine`.
    """

    step: Step
    small: Step
    model: DecoderLM
    small_model: DecoderLM
    limits: dict[str, Any]

    def new(self, guesses: str = "none", **changes: Any) -> Engine:
        drafter = {"none": None, "ngram": "ngram", "model": self.small_model}[guesses]
        engine = Engine(self.model, salt="", drafter=drafter, **(self.limits | changes))
        engine.step_fn = self.step
        if isinstance(engine._drafter, ModelDrafter):
            engine._drafter._step = self.small
        return engine


def run(engine: Engine, jobs: list[Job], *, progress: str | None = None) -> list[list[Answer]]:
    """Every job at its step, cancelled at its step; the answers of each job's samples."""
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].arrival)
    queued: dict[int, list[Sequence]] = {}
    leaving: list[tuple[int, int]] = []
    total = sum(job.params.n for job in jobs)
    with tqdm(total=total, desc=progress, unit="sequence", disable=progress is None) as bar:
        for now in itertools.count():
            while order and jobs[order[0]].arrival <= now:
                index = order.pop(0)
                job = jobs[index]
                queued[index] = engine.add(job.prompt, job.params, priority=job.priority)
                if job.cancelled_after is not None:
                    leaving.append((now + job.cancelled_after, index))
            for sequence in [s for due, index in leaving if due <= now for s in queued[index]]:
                bar.update(sequence.finish_reason is None)
                engine.abort(sequence)
            leaving = [(due, index) for due, index in leaving if due > now]
            if not order and not engine.has_work:
                break
            bar.update(sum(s.finish_reason is not None for s in engine.step()))
    return [[_answer(s) for s in queued[i]] for i in range(len(jobs))]


def _answer(sequence: Sequence) -> Answer:
    entries = sequence.logprobs
    values = (
        np.array(sequence.output, np.int64),
        np.array([e[0] for e in entries], np.float64),
        np.array([e[1] for e in entries], np.int64),
        np.array([e[2] for e in entries], np.float32).reshape(-1, TOP),
        np.array([e[3] for e in entries], np.int64).reshape(-1, TOP),
    )
    prompt = np.array([[e[0], *e[2]] for e in sequence.prompt_logprobs], np.float64)
    return Answer(sequence.finish_reason, values, prompt)


def undisturbed(jobs: list[Job]) -> list[Job]:
    """The same requests, all at once, last first, nobody cancelled or preferred."""
    return [job._replace(arrival=0, cancelled_after=None, priority=0) for job in reversed(jobs)]


def differing(found: list[list[Answer]], expected: list[list[Answer]]) -> tuple[int, int]:
    """How many values were compared and how many differ in a bit; of a cancelled request what there is of it."""
    compared = wrong = 0
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            cut = len(a.values[0]) if a.finish_reason == "abort" else None
            wrong += cut is None and a.finish_reason != b.finish_reason
            pairs = [(x, y[:cut]) for x, y in zip(a.values, b.values, strict=True)]
            if cut is None:
                pairs.append((a.prompt_logprobs, b.prompt_logprobs))
            for x, y in pairs:
                compared += y.size
                same = x.shape == y.shape
                wrong += int(np.count_nonzero(x.view(np.uint8) != y.view(np.uint8))) if same else y.size + 1
    return compared, wrong


def soak(
    engines: Engines,
    requests: int,
    *,
    seed: int,
    poison: int,
    alone: int,
    free_pages: int,
    rounds: tuple[str, ...] = ROUNDS,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs everything; counts of what happened and of what differed.

    Args:
        requests: in all rounds together.
        poison: the token whose embedding is NaN.
        alone: how many requests are compared with a fresh engine of their own.
        free_pages: pages that a round may use.
    """
    rng, total = np.random.default_rng(seed), dict.fromkeys(("compared", "differing", "alone"), 0)
    limits, found_rounds = engines.limits, {}
    rate = limits["max_num_seqs"] / 12
    for number, guesses in enumerate(rounds):
        count = requests // len(rounds) + (number < requests % len(rounds))
        jobs = traffic(
            count,
            seed=seed * len(rounds) + number,
            max_len=limits["max_model_len"],
            poison=poison,
            rate=rate,
        )
        label = f"guesses: {guesses}" if progress else None
        engine = engines.new(guesses)
        taken = [engine.pool.allocate() for _ in range(engine.pool.available - free_pages)]
        programs, began = engines.step.compiled + engines.small.compiled, time.perf_counter()
        found = run(engine, jobs, progress=label)
        seconds = time.perf_counter() - began
        programs = engines.step.compiled + engines.small.compiled - programs
        engine.pool.release(taken)
        assert engine.pool.available == engine.pool.num_pages - 1, "a page was lost"
        stats = engine.stats()
        del engine

        other = engines.new(enable_prefix_caching=False)
        other.scheduler.max_num_batched_tokens //= 2
        expected = run(other, undisturbed(jobs), progress="reference" if progress else None)[::-1]
        del other
        compared, wrong = differing(found, expected)
        sample = rng.permutation(count)[: -(-alone * count // requests)]
        for index in tqdm(sample, desc="alone", unit="request", disable=not progress):
            (own,) = run(engines.new(enable_prefix_caching=False), undisturbed([jobs[index]]))
            for answers in (found[index], expected[index]):
                more, bad = differing([answers], [own])
                compared, wrong = compared + more, wrong + bad
        total["compared"] += compared
        total["differing"] += wrong
        total["alone"] += len(sample)
        found_rounds[guesses] = {
            "requests": count,
            "seconds": round(seconds, 1),
            "steps": stats.steps,
            "output_tokens": stats.output_tokens,
            "cancelled": stats.cancelled,
            "poisoned": stats.failed,
            "preemptions": stats.preemptions,
            "drafted": stats.drafted_tokens,
            "accepted": stats.accepted_tokens,
            "cache_hit_rate": round(stats.cache_hit_rate, 3),
            "programs_compiled_meanwhile": programs,
        }
    return {"requests": requests, **total, "rounds": found_rounds}


def shortcomings(result: dict[str, Any]) -> list[str]:
    """What a soak should have shown and did not."""
    missing = [] if result["differing"] == 0 else ["differing"]
    for guesses, found in result["rounds"].items():
        wanted = ["cancelled", "poisoned", "preemptions"] + ["drafted", "accepted"] * (guesses != "none")
        missing += [f"{guesses}: {name}" for name in wanted if not found[name]]
        if found["cache_hit_rate"] <= 0.5:
            missing.append(f"{guesses}: cache_hit_rate")
    return missing


def poisoned(model: DecoderLM, token: int) -> DecoderLM:
    """The model with NaN for one token's embedding; a head that shared the embedding keeps the old one."""
    mask = (
        jnp.zeros((model.config.hidden_size, model.config.vocab_size), model.dtype).at[:, token].set(jnp.nan)
    )
    mask = matmul_op.pack(mask, backend=model.backend)
    table = model.head if model.embedding is None else model.embedding
    model.embedding = nnx.data(nnx.Param(jnp.where(jnp.isnan(mask), mask, table[...])))
    return model


def load(
    name: str, *, dtype: jnp.dtype, backend: str | None, max_model_len: int, layers: int | None = None
) -> tuple[DecoderLM, DecoderLM]:
    """The named model and a random one of one layer with the same vocabulary."""
    checkpoint = None if name == "qwen3-8b-shape" else open_checkpoint(name)
    config = (QWEN3_8B if checkpoint is None else checkpoint.config) | (
        {"num_hidden_layers": layers} if layers else {}
    )
    common = {"dtype": dtype, "backend": backend, "max_model_len": max_model_len}
    small = random_model(config | {"num_hidden_layers": 1}, **common)
    if checkpoint is None:
        return random_model(config, **common), small
    return build_model(checkpoint, config, **common), small


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--backend", help="the device's own by default")
    parser.add_argument("--max-num-seqs", type=int, default=8 if on_cpu else 256)
    parser.add_argument("--max-model-len", type=int, default=512 if on_cpu else 1536)
    parser.add_argument("--max-num-batched-tokens", type=int, default=64 if on_cpu else 4096)
    parser.add_argument("--rounds", nargs="+", choices=ROUNDS, default=ROUNDS)
    parser.add_argument("--layers", type=int, help="of qwen3-8b-shape, for a trial")
    asked = parser.parse_args()

    use_compile_cache()
    model, small = load(
        asked.model,
        dtype=jnp.dtype(asked.dtype),
        backend=asked.backend,
        max_model_len=asked.max_model_len,
        layers=asked.layers,
    )
    poison = model.config.vocab_size - 2
    poisoned(model, poison)
    table = -(-asked.max_model_len // PAGE_SIZE)
    limits = {
        "max_num_seqs": asked.max_num_seqs,
        "max_num_batched_tokens": asked.max_num_batched_tokens,
        "max_model_len": asked.max_model_len,
        "num_pages": asked.max_num_seqs * table + 1,
        "num_speculative_tokens": 3,
    }
    engines = Engines(Step(model), Step(small), model, small, limits)
    began = time.perf_counter()
    if not on_cpu:
        for guesses in asked.rounds:  # with guesses a step has more rows
            engines.new(guesses).compile_all(progress=True)
    compiled_in = time.perf_counter() - began
    result = soak(
        engines,
        asked.requests,
        seed=asked.seed,
        poison=poison,
        alone=asked.alone,
        free_pages=asked.max_num_seqs + table,
        rounds=tuple(asked.rounds),
        progress=True,
    )
    result["missing"] = shortcomings(result)
    result |= {"model": asked.model, "compile_seconds": round(compiled_in, 1), "limits": limits}
    print(json.dumps(result | environment(model.backend, asked.dtype)))
    sys.exit(bool(result["missing"]))


if __name__ == "__main__":
    main()
