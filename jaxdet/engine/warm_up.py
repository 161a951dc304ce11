"""Compiles everything at start, several programs at a time."""

import concurrent.futures
import os
import threading

from tqdm import tqdm

from jaxdet.engine import lowering
from jaxdet.engine.step import Step
from jaxdet.engine.wanted import Job, Wanted

MOST_THREADS = 16


def compile_all(wanted: Wanted, *, progress: bool) -> None:
    """Compiles every program; what is slow to lower is lowered by several processes first.

    Args:
        progress: show a bar.
    """
    jobs, stopped = wanted.jobs(Step.compiler), threading.Event()

    def compile_one(number: int, job: Job) -> None:
        wait(number)
        if not stopped.is_set():
            job()

    with (
        concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
        lowering.beside(wanted) as wait,
        tqdm(total=len(jobs), desc="Compiling", unit="program", disable=not progress) as bar,
    ):
        try:
            running = [pool.submit(compile_one, *numbered) for numbered in enumerate(jobs)]
            for done in concurrent.futures.as_completed(running):
                done.result()
                bar.update()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
