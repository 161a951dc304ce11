"""The two columns: the same batches through plain jitted JAX and through jaxdet's engine.

Both yield after every step of the device how far they are, so that one thread can move them on by turns.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxdet.arena.answer import Answer
from jaxdet.arena.traffic import Batch, Traffic
from jaxdet.baseline import Baseline
from jaxdet.llm import LLM
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.sample.op import SamplingRows, sample

CHUNK = 32
"""Prompt tokens that plain JAX takes at once, so that prompts of any length run the same two programs."""
TAKEN = np.zeros(0, np.float32)
"""In the place of logits that have been read."""


class Progress(NamedTuple):
    """Where a column is."""

    batch: int
    step: int
    """Tokens that each of the batch's answers has."""
    finished: Sequence[Answer] = ()
    """The batch's answers, once all of them have ended."""


def plain_column(
    plain: Baseline,
    prompt: list[int],
    params: SamplingParams,
    plan: Sequence[Batch],
    ends: frozenset[int],
) -> Generator[Progress]:
    """The batches through plain JAX, one fixed batch after the other. Noise is jaxdet's, so only logits may differ.

    Args:
        ends: tokens that end an answer.
    """
    for number, batch in enumerate(plan):
        yield Progress(number, 0)
        traffic = Traffic(number, batch, plain.config.vocab_size)
        others = traffic.requests()
        rows = [prompt if i in traffic.places else next(others)[0] for i in range(batch.size)]
        answers = {place: Answer(batch.size) for place in traffic.places}
        open_places = set(answers)
        steps = plain.decode(rows, chunk=CHUNK)
        logits = next(steps)
        positions = np.array([len(row) for row in rows], np.int32)
        while True:
            tokens, values = _choose(logits, params, positions), np.asarray(logits)
            for place in sorted(open_places):
                token = int(tokens[place])
                answers[place].add(token, values[place])
                if token in ends or len(answers[place].tokens) == params.max_tokens:
                    open_places.remove(place)
            if not open_places:
                break
            yield Progress(number, max(len(answer.tokens) for answer in answers.values()))
            logits, positions = steps.send(tokens), positions + 1
        yield Progress(number + 1, 0, list(answers.values()))


def _choose(logits: jax.Array, params: SamplingParams, positions: np.ndarray) -> np.ndarray:
    """One token per row [B]; all rows have the parameters of the run, which doesn't change ours."""
    count, seed = len(positions), params.seed or 0
    rows = SamplingRows(
        temperature=np.full(count, params.temperature, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.full((count, 2), (seed & 0xFFFFFFFF, seed >> 32), np.uint32),
        sample_index=np.zeros(count, np.int32),
        position=positions,
    )
    return np.asarray(_draw(logits, rows if params.temperature else None))


@jax.jit
def _draw(logits: jax.Array, rows: SamplingRows | None) -> jax.Array:
    return sample(logits, rows, backend="xla")[0]


def our_column(
    llm: LLM, prompt: list[int], params: SamplingParams, plan: Sequence[Batch]
) -> Generator[Progress]:
    """The batches through the engine, where other people's requests also end and come anew while ours run."""
    engine = llm.engine
    for number, batch in enumerate(plan):
        yield Progress(number, 0)
        traffic = Traffic(number, batch, engine.vocab_size)
        others = traffic.requests()
        answers, crowd = {}, []
        try:
            for place in range(batch.size):
                if place in traffic.places:
                    (sequence,) = engine.add(prompt, params)
                    sequence.keep_logits = True
                    answers[sequence] = Answer(batch.size)
                else:
                    crowd += engine.add(*next(others))
            while any(sequence.finish_reason is None for sequence in answers):
                crowd = [s if s.finish_reason is None else engine.add(*next(others))[0] for s in crowd]
                engine.step()
                for sequence, answer in answers.items():
                    for at in range(len(answer.tokens), sequence.num_output):
                        answer.add(sequence.output[at], sequence.logits[at])
                        sequence.logits[at] = TAKEN
                    if sequence.finish_reason == "error":
                        raise ValueError("the model's logits are not finite; check its weights and dtype")
                yield Progress(number, max(len(answer.tokens) for answer in answers.values()))
        finally:
            for sequence in (*answers, *crowd):
                engine.abort(sequence)
        yield Progress(number + 1, 0, list(answers.values()))
