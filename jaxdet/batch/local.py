"""One engine in this process."""

from collections.abc import Callable, Generator
from typing import Any

from jaxdet.batch.engine import BatchEngine
from jaxdet.batch.request import Requests, Result
from jaxdet.batch.run import Settings
from jaxdet.batch.source import Source
from jaxdet.llm import LLM


def make_engine(settings: Settings, **llm: Any) -> tuple[BatchEngine, str]:
    """Loads the model; returns its engine with its fingerprint.

    Args:
        llm: arguments of `LLM` that change no answer.
    """
    model = LLM(
        settings.model,
        dtype=settings.dtype,
        backend=settings.backend,
        max_model_len=settings.max_model_len,
        seed=settings.seed,
        **llm,
    )
    requests = Requests(model, settings.served_model_name or model.name, settings.defaults)
    return BatchEngine(model, requests), requests.fingerprint


def answer_here(
    settings: Settings, source: Source, has: Callable[[int], bool], **llm: Any
) -> Generator[tuple[str, Result]]:
    """Results of the lines that are missing, with the engine's fingerprint; see `run.Answers`."""
    engine, fingerprint = make_engine(settings, **llm)
    lines = (line for part in source.slices for line in source.read(part) if not has(line.number))
    for result in engine.answers(lines):
        yield fingerprint, result
