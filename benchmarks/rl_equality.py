"""Sampler's and trainer's log-probabilities, compared bit by bit over as many tokens as asked for.

    python benchmarks/rl_equality.py [MODEL] [--tokens 1000000] [--dtype bfloat16] [--out out]

Rounds alternate between greedy and sampled (T = 1), with and without speculation (n-gram lookup). Prompts and outputs
have ragged lengths, most prompts begin with one of four prefixes of which full pages are cached, and sampled prompts
have several completions. The trainer's pass packs other neighbours together than the sampler had. As a control each
round's first micro-batch is computed again with weights one unit in the last place away. Writes JSON after every round,
so that a run which is stopped has counted; exits with 1 if a token differs or the control doesn't.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from tqdm import tqdm

from jaxdet import LLM, SamplingParams
from jaxdet.files import write_whole
from jaxdet.rl import Comparison, compare, logprobs, pack
from jaxdet.rl.comparison import sampled_logprobs
from jaxdet.testing import write_tiny_model
from jaxdet.verify.report import environment
from pallas_kernels.backend import compiler_options

PREFIX, LONGEST_PROMPT, LONGEST_OUTPUT = 256, 500, 600
PROMPTS, COMPLETIONS = 24, 4
"""Of one round."""
MICRO_BATCH = 2048


@dataclasses.dataclass
class Counts:
    """What was compared so far."""

    tokens: int = 0
    differing: int = 0
    max_abs: float = 0.0
    greedy: int = 0
    sampled: int = 0
    cached_prompt_tokens: int = 0
    accepted_guesses: int = 0
    control_tokens: int = 0
    control_differing: int = 0

    def add(self, found: Comparison, *, greedy: bool) -> None:
        self.tokens += found.compared
        self.differing += found.differing
        self.max_abs = max(self.max_abs, found.max_abs)
        self.greedy += found.compared * greedy
        self.sampled += found.compared * (not greedy)


def measure(model: str | Path, tokens: int, dtype: str) -> Iterator[tuple[Counts, LLM]]:
    """Compares at least `tokens` output tokens; yields after every round."""
    options: dict[str, Any] = dict(dtype=dtype, max_model_len=LONGEST_PROMPT + LONGEST_OUTPUT)
    engines = [LLM(model, **options), LLM(model, **options, speculative_model="ngram")]
    step = engines[0].engine.step_fn
    score = jax.jit(
        lambda state, micro: logprobs(nnx.merge(step.graph, state), micro),
        compiler_options=compiler_options(step.backend),
    )
    wrong = jax.jit(lambda state: jax.tree.map(lambda x: jnp.nextafter(x, jnp.ones_like(x)), state))(
        step.state
    )
    rng, counts = np.random.default_rng(0), Counts()
    prefixes = rng.integers(0, step.config.vocab_size, (4, PREFIX)).tolist()
    with tqdm(total=tokens, unit="token") as bar:
        for turn in range(10**9):
            if counts.tokens >= tokens:
                break
            llm, greedy = engines[turn % 2], turn % 4 >= 2
            before = counts.tokens
            _round(llm, score, step.state, wrong, prefixes, rng, counts, greedy=greedy)
            bar.update(counts.tokens - before)
            counts.cached_prompt_tokens = sum(llm.stats().cached_tokens for llm in engines)
            counts.accepted_guesses = engines[1].stats().accepted_tokens
            yield counts, llm


def _round(llm: LLM, score, right, wrong, prefixes, rng, counts: Counts, *, greedy: bool) -> None:
    vocab, prompts = llm.engine.step_fn.config.vocab_size, []
    for i in range(PROMPTS):
        prefix = prefixes[i % 6] if i % 6 < len(prefixes) else []
        rest = rng.integers(1, LONGEST_PROMPT - len(prefix))
        prompts.append(prefix + rng.integers(0, vocab, rest).tolist())
    params = [
        SamplingParams(
            n=1 if greedy else COMPLETIONS,
            temperature=0.0 if greedy else 1.0,
            max_tokens=int(rng.integers(1, LONGEST_OUTPUT)),
            seed=int(rng.integers(2**63)),
            logprobs=0,
        )
        for _ in prompts
    ]
    done = [
        (list(output.prompt_token_ids), completion)
        for output in llm.generate(prompts, params, use_tqdm=False)
        for completion in output.outputs
    ]
    done = [done[i] for i in rng.permutation(len(done))]
    left = iter(done)
    for number, (micro, where) in enumerate(
        pack([prompt + list(c.token_ids) for prompt, c in done], MICRO_BATCH)
    ):
        here = [(rows, *next(left)) for rows in where]
        places = [slice(rows.start + len(prompt) - 1, rows.stop - 1) for rows, prompt, _ in here]
        sampled = [sampled_logprobs(completion) for *_, completion in here]

        def against(state, micro=micro, places=places, sampled=sampled) -> Comparison:
            values = np.asarray(score(state, micro))
            return compare(sampled, [values[at] for at in places])

        counts.add(against(right), greedy=greedy)
        if number == 0:
            control = against(wrong)
            counts.control_tokens += control.compared
            counts.control_differing += control.differing


def main(
    model: Annotated[str | None, typer.Argument(help="A tiny random one by default.")] = None,
    tokens: int = 1_000_000,
    dtype: str = "bfloat16",
    out: Path = Path("out"),
) -> None:
    began, counts = time.perf_counter(), Counts()
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for counts, llm in measure(model or write_tiny_model(Path(folder) / "tiny"), tokens, dtype):
            result = {"model": model or "tiny"} | dataclasses.asdict(counts)
            result |= {"seconds": round(time.perf_counter() - began)}
            result |= environment(llm.engine.step_fn.backend, dtype)
            write_whole(out / "rl-equality.json", json.dumps(result, indent=1) + "\n")
    print(counts)
    if counts.differing or not counts.control_differing:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
