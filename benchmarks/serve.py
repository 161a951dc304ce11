"""A load generator: latency and throughput of `jaxdet serve` beside the offline engine, and whether bits moved.

    python benchmarks/serve.py MODEL [--clients 1 8 64] [--requests 128] [--prompt 128] [--output 64] [--backend NAME]
        [--max-model-len N] [--max-num-batched-tokens N] [--num-pages N] [--out FILE]

Runs random prompts through `LLM.generate`, all at once, then starts the server's process beside the same LLM and lets
so many clients at a time, in a third process, stream the same completions. TTFT is from sending a
request to its first event, inter-token from event to event. Every answer is compared with the offline one. Both sides
run once unmeasured, so that nothing compiles in between.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.app import Model, Settings
from jaxdet.server.http import Serve
from jaxdet.server.run import host_of, start_http


def requests_of(llm: LLM, count: int, prompt: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, llm.tokenizer.vocab_size, (count, prompt)).tolist()


def serve(llm: LLM, port: int) -> tuple[subprocess.Popen, threading.Thread]:
    """The process of `jaxdet serve` that speaks HTTP, and the engine in a thread."""
    process, connection = start_http(Serve(Model.of(llm), Settings(), "127.0.0.1", port, 5))
    thread = threading.Thread(target=host_of(llm, connection).run)
    thread.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return process, thread
        except ConnectionRefusedError:
            time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def cpu_seconds(process: subprocess.Popen, thread: threading.Thread) -> tuple[float, float]:
    """CPU time so far, of HTTP and of the engine."""
    assert thread.ident is not None
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system, time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def load(*arguments: Any) -> dict[str, Any]:
    return asyncio.run(_load(*arguments))


async def _load(
    host: str, port: int, model: str, prompts: list[list[int]], output: int, clients: int
) -> dict[str, Any]:
    """All prompts, `clients` at a time. What arrives is only noted: reading JSON would take the server's time."""
    gate = asyncio.Semaphore(clients)
    arrivals: list[list[tuple[float, bytes]]] = [[] for _ in prompts]

    async def one(place: int, prompt: list[int]) -> None:
        body = {"model": model, "prompt": prompt, "max_tokens": output, "seed": place}
        payload = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        async with gate:
            arrivals[place].append((time.perf_counter(), b""))
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(
                f"{head}Connection: close\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload
            )
            while data := await reader.read(2**16):
                arrivals[place].append((time.perf_counter(), data))
            writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))
    seconds = time.perf_counter() - began
    first, between, texts, count = [], [], [], 0
    for found in arrivals:
        times = [when for when, data in found if not data or b"data: " in data]
        first.append(times[1] - times[0])
        between += np.diff(times[1:]).tolist()
        lines = b"".join(data for _, data in found).splitlines()
        events = [line[6:] for line in lines if line.startswith(b"data: {")]
        count += len(events)
        texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))

    def percentile(values: list[float], p: float) -> float:
        return round(float(np.percentile(values, p)) * 1e3, 2)

    return {
        "tokens_per_second": round(len(prompts) * output / seconds, 1),
        "tokens_per_event": round(len(prompts) * output / count, 2),
        "ttft_ms": {f"p{p}": percentile(first, p) for p in (50, 99)},
        "between_ms": {f"p{p}": percentile(between, p) for p in (50, 99)},
        "texts": texts,
    }


def offline(llm: LLM, prompts: list[list[int]], output: int) -> tuple[float, float, list[str]]:
    """Output tokens a second of all prompts at once, the thread's CPU time per token, and their texts."""
    params = [SamplingParams(max_tokens=output, seed=i, ignore_eos=True) for i in range(len(prompts))]
    tokens, began, cpu = len(prompts) * output, time.perf_counter(), time.thread_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
    return tokens / seconds, cpu / tokens, [o.outputs[0].text for o in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--backend", help="the device's own by default")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Without the prefix cache: prompts are the same in every run.
    llm = LLM(
        args.model,
        backend=args.backend,
        max_num_seqs=max(args.clients),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        num_pages=args.num_pages,
        enable_prefix_caching=False,
        compile_at_start=True,
    )
    prompts = requests_of(llm, args.requests, args.prompt)
    offline(llm, prompts, args.output)  # warms up
    best, cpu, expected = offline(llm, prompts, args.output)

    http, engine = serve(llm, port := free_port())
    rows = []
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # clients get an interpreter of their own
        for clients in args.clients:
            few = prompts[: max(clients, args.requests * clients // max(args.clients))]
            asked = "127.0.0.1", port, llm.name, few, args.output, clients
            pool.apply(load, asked)  # warms up
            before = cpu_seconds(http, engine)
            found = pool.apply(load, asked)
            used = np.subtract(cpu_seconds(http, engine), before)
            per_token = [round(seconds / (len(few) * args.output) * 1e6, 1) for seconds in used]
            row = {"clients": clients, "requests": len(few)} | found
            row["cpu_us_per_token"] = dict(zip(("http", "engine"), per_token, strict=True))
            texts = row.pop("texts")
            row["answers_that_differ"] = sum(a != b for a, b in zip(texts, expected, strict=False))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    http.terminate()
    engine.join()
    report = {
        "model": llm.name,
        "device": jax.devices()[0].device_kind,
        "backend": llm.engine.step_fn.backend,
        "machine": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "prompt": args.prompt,
        "output": args.output,
        "load_average": os.getloadavg()[0],
        "offline_tokens_per_second": round(best, 1),
        "offline_cpu_us_per_token": round(cpu * 1e6, 1),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    args.out.write_text(text + "\n") if args.out else print(text)


if __name__ == "__main__":
    main()
