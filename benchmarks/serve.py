"""A load generator: latency and throughput of `jaxdet serve` beside the offline engine, and whether bits moved.

    python benchmarks/serve.py MODEL [--clients 1 8 64] [--requests 128] [--prompt 128] [--output 64] [--backend NAME]
        [--max-model-len N] [--max-num-seqs N] [--max-num-batched-tokens N] [--num-pages N] [--http-processes N]
        [--out FILE]

Runs random prompts through `LLM.generate`, all at once, then starts the server's HTTP processes beside the same LLM and
lets so many clients at a time, in as many other processes, stream the same completions. TTFT is from sending a
request to its first event, inter-token from event to event. Every answer is compared with the offline one. Both sides
run once unmeasured, so that nothing compiles in between. CPU time a token is that of all HTTP processes, of the
engine's thread, of the whole process that it is in (on a CPU the model's, too), and of all clients' processes.

The engine takes as many sequences at once as there are clients at most, unless `--max-num-seqs` says otherwise. Offline
the next prompt always waits; here each client sends it once it has the whole answer, and its place is empty till then.
With more clients than places some wait here, too.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from jaxdet.server.app import Model, Settings
from jaxdet.server.http import Serve
from jaxdet.server.listeners import bind, default_processes
from jaxdet.server.run import host_of, http_processes


def requests_of(llm: LLM, count: int, prompt: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(0, llm.tokenizer.vocab_size, (count, prompt)).tolist()


def cpu_seconds(processes: Sequence[subprocess.Popen], engine: threading.Thread) -> dict[str, float]:
    """CPU time so far, of HTTP, of the engine and of the process that it is in."""
    assert engine.ident is not None
    times = [psutil.Process(process.pid).cpu_times() for process in processes]
    return {
        "http": sum(t.user + t.system for t in times),
        "engine": time.clock_gettime(time.pthread_getcpuclockid(engine.ident)),
        "engine_process": time.process_time(),
    }


def start_clients(count: int) -> list[subprocess.Popen]:
    command = [sys.executable, Path(__file__).with_name("serve_load.py")]
    return [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]


def load(
    processes: Sequence[subprocess.Popen],
    port: int,
    model: str,
    prompts: list[list[int]],
    output: int,
    clients: int,
) -> dict[str, Any]:
    """All prompts, `clients` at a time, which are shared out over the processes."""
    requests = list(enumerate(prompts))
    used = processes[:clients]
    for place, process in enumerate(used):
        job = {
            "port": port,
            "model": model,
            "output": output,
            "clients": len(range(place, clients, len(used))),
            "requests": requests[place :: len(used)],
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in used if process.stdout is not None]
    seconds = max(f["ended"] for f in found) - min(f["began"] for f in found)
    first, between = (np.concatenate([f[name] for f in found]) for name in ("first", "between"))
    texts = {int(place): text for f in found for place, text in f["texts"].items()}

    def percentile(values: np.ndarray, p: float) -> float:
        return round(float(np.percentile(values, p)) * 1e3, 2)

    return {
        "tokens_per_second": round(len(prompts) * output / seconds, 1),
        "tokens_per_event": round(len(prompts) * output / sum(f["events"] for f in found), 2),
        "ttft_ms": {f"p{p}": percentile(first, p) for p in (50, 99)},
        "between_ms": {f"p{p}": percentile(between, p) for p in (50, 99)},
        "cpu": sum(f["cpu"] for f in found),
        "texts": [texts[place] for place in range(len(prompts))],
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
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--num-pages", type=int)
    parser.add_argument("--http-processes", type=int, default=default_processes())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Without the prefix cache: prompts are the same in every run.
    llm = LLM(
        args.model,
        backend=args.backend,
        max_num_seqs=args.max_num_seqs or max(args.clients),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        num_pages=args.num_pages,
        enable_prefix_caching=False,
        compile_at_start=True,
    )
    prompts = requests_of(llm, args.requests, args.prompt)
    offline(llm, prompts, args.output)  # warms up
    best, cpu, expected = offline(llm, prompts, args.output)

    listeners = bind("127.0.0.1", 0, args.http_processes)
    port = listeners[0].getsockname()[1]
    asked = Serve(Model.of(llm), Settings(), 5)
    rows, clients_in = [], start_clients(default_processes())
    with http_processes(listeners, asked) as (http, connections):
        engine = threading.Thread(target=host_of(llm, connections, asked.settings).run)
        engine.start()
        for clients in args.clients:
            few = prompts[: max(clients, args.requests * clients // max(args.clients))]
            work = clients_in, port, llm.name, few, args.output, clients
            load(*work)  # warms up
            before = cpu_seconds(http, engine)
            found = load(*work)
            after = cpu_seconds(http, engine)
            used = {name: after[name] - before[name] for name in after} | {"clients": found.pop("cpu")}
            row = {"clients": clients, "requests": len(few)} | found
            row["cpu_us_per_token"] = {
                name: round(seconds / (len(few) * args.output) * 1e6, 1) for name, seconds in used.items()
            }
            texts = row.pop("texts")
            row["answers_that_differ"] = sum(a != b for a, b in zip(texts, expected, strict=False))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
        for process in (*http, *clients_in):
            process.terminate()
        for process in http:
            process.wait()
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
        "max_num_seqs": llm.engine.scheduler.max_num_seqs,
        "http_processes": args.http_processes,
        "client_processes": len(clients_in),
        "load_average": os.getloadavg()[0],
        "offline_tokens_per_second": round(best, 1),
        "offline_cpu_us_per_token": round(cpu * 1e6, 1),
        "rows": rows,
    }
    text = json.dumps(report, indent=1)
    args.out.write_text(text + "\n") if args.out else print(text)


if __name__ == "__main__":
    main()
