"""What running together gains: 64 requests at once beside the same requests one at a time.

    python benchmarks/concurrency.py [MODEL] [--dtype float32] [--requests 64] [--rounds 3] [--out out]

Prompts of 64 random tokens, 32 output tokens, greedy, end-of-sequence ignored, nothing from the prefix cache. A round
runs some of the requests one after the other and then all of them together, so that what else the machine does hits
both; the ratio is the median of the rounds' ratios. Every completion must be the same both ways. Writes JSON.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from jaxdet import LLM, SamplingParams
from jaxdet.verify.report import environment

PROMPT, OUTPUT = 64, 32
ALONE = 4
"""How many of the requests a round runs one at a time: enough for a rate."""
PARAMS = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True)


def measure(llm: LLM, requests: int, rounds: int) -> dict[str, list[float]]:
    """Output tokens a second of every round, one at a time and together."""
    prompts = np.random.default_rng(0).integers(0, llm.engine.vocab_size, (requests, PROMPT))
    rates: dict[str, list[float]] = {"one at a time": [], "together": []}
    for number in range(rounds + 1):
        began = time.perf_counter()
        alone = [llm.generate(p, PARAMS, use_tqdm=False)[0] for p in prompts[:ALONE]]
        between = time.perf_counter()
        together = llm.generate(prompts, PARAMS, use_tqdm=False)
        ended = time.perf_counter()
        for a, b in zip(alone, together, strict=False):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids, "company changed a completion"
        if number:  # the first round compiles
            rates["one at a time"].append(ALONE * OUTPUT / (between - began))
            rates["together"].append(requests * OUTPUT / (ended - between))
    return rates


def main(
    model: Annotated[str, typer.Argument()] = "smollm2-135m",
    dtype: str = "auto",
    requests: int = 64,
    rounds: int = 3,
    out: Path = Path("out"),
) -> None:
    llm = LLM(
        model, dtype=dtype, max_num_seqs=requests, max_model_len=PROMPT + OUTPUT, enable_prefix_caching=False
    )
    rates = measure(llm, requests, rounds)
    ratios = [b / a for a, b in zip(*rates.values(), strict=True)]
    result = {
        "requests": requests,
        "prompt_tokens": PROMPT,
        "output_tokens": OUTPUT,
        "tokens_per_second": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "ratio": round(statistics.median(ratios), 2),
    }
    result |= {"model": llm.name} | environment(llm.engine.step_fn.backend, llm.dtype)
    out.mkdir(exist_ok=True)
    (out / "concurrency.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
