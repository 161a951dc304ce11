"""A load generator: latency and throughput of `jaxdet serve` beside the offline engine, and whether bits moved.

    python benchmarks/serve.py MODEL [--clients 1 8 64] [--requests 128] [--prompt 128] [--output 64] [--out FILE]

Runs random prompts through `LLM.generate`, all at once, then starts the server over the same LLM (a thread, a free
port) and lets so many clients at a time, in another process, stream the same completions. TTFT is from sending a
request to its first event, inter-token from event to event. Every answer is compared with the offline one. Both sides
run once unmeasured, so that nothing compiles in between.
"""

import argparse
import asyncio
import json
import multiprocessing
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import uvicorn
from openai import AsyncOpenAI

from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.app import Settings, create_app


def requests_of(llm: LLM, count: int, prompt: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, llm.tokenizer.vocab_size, (count, prompt)).tolist()


def serve(llm: LLM) -> tuple[uvicorn.Server, threading.Thread, str]:
    server = uvicorn.Server(uvicorn.Config(create_app(llm, Settings()), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"


def load(*arguments: Any) -> dict[str, Any]:
    return asyncio.run(_load(*arguments))


async def _load(url: str, model: str, prompts: list[list[int]], output: int, clients: int) -> dict[str, Any]:
    """All prompts, `clients` at a time."""
    gate = asyncio.Semaphore(clients)
    first, between, texts = [], [], [""] * len(prompts)

    async def one(place: int, prompt: list[int]) -> None:
        async with gate:
            before = time.perf_counter()
            stream = await client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=output,
                seed=place,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            times = first
            async for chunk in stream:
                now = time.perf_counter()
                times.append(now - before)
                before, times = now, between
                texts[place] += chunk.choices[0].text

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))
        seconds = time.perf_counter() - began

    def percentile(values: list[float], p: float) -> float:
        return round(float(np.percentile(values, p)) * 1e3, 2)

    return {
        "tokens_per_second": round(len(prompts) * output / seconds, 1),
        "ttft_ms": {f"p{p}": percentile(first, p) for p in (50, 99)},
        "inter_token_ms": {f"p{p}": percentile(between, p) for p in (50, 99)},
        "texts": texts,
    }


def offline(llm: LLM, prompts: list[list[int]], output: int) -> tuple[float, list[str]]:
    """Output tokens a second of all prompts at once, and their texts."""
    params = [SamplingParams(max_tokens=output, seed=i, ignore_eos=True) for i in range(len(prompts))]
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return len(prompts) * output / seconds, [o.outputs[0].text for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Without the prefix cache: prompts are the same in every run.
    llm = LLM(args.model, enable_prefix_caching=False, max_num_seqs=max(args.clients))
    prompts = requests_of(llm, args.requests, args.prompt)
    offline(llm, prompts, args.output)  # compiles
    best, expected = offline(llm, prompts, args.output)

    server, thread, url = serve(llm)
    rows = []
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # clients get an interpreter of their own
        for clients in args.clients:
            few = prompts[: max(clients, args.requests * clients // max(args.clients))]
            pool.apply(load, (url, llm.name, few, args.output, clients))  # compiles
            found = pool.apply(load, (url, llm.name, few, args.output, clients))
            row = {"clients": clients, "requests": len(few)} | found
            texts = row.pop("texts")
            row["answers_that_differ"] = sum(a != b for a, b in zip(texts, expected, strict=False))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    server.should_exit = True
    thread.join()
    report = {
        "model": llm.name,
        "device": jax.devices()[0].device_kind,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "prompt": args.prompt,
        "output": args.output,
        "offline_tokens_per_second": round(best, 1),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    args.out.write_text(text + "\n") if args.out else print(text)


if __name__ == "__main__":
    main()
