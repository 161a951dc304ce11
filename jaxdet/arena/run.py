"""A run: both columns by turns, told as a stream of events."""

from collections.abc import Generator, Mapping
from typing import Any

from jaxdet.api.fingerprint import fingerprint
from jaxdet.arena.answer import Answer, digest
from jaxdet.arena.columns import Progress, our_column, plain_column
from jaxdet.arena.settings import CONTEXT, MOST_LOAD, Settings
from jaxdet.arena.traffic import Batch, batches
from jaxdet.arena.tree import divergence_tree
from jaxdet.baseline import Baseline
from jaxdet.checkpoints import open_checkpoint
from jaxdet.llm import LLM
from pallas_kernels.numerics import NUMERICS_VERSION, PAGE_SIZE

Event = dict[str, Any]
"""JSON; "event" names its kind."""


class Arena:
    """One model, loaded twice: into jaxdet's engine and into plain jitted JAX.

    Args:
        model, dtype, backend: as for `LLM`.
    """

    def __init__(self, model: str, *, dtype: str = "bfloat16", backend: str | None = None):
        pages = (MOST_LOAD + 1) * -(-CONTEXT // PAGE_SIZE)  # what is left belongs to plain JAX
        self.llm = LLM(
            model,
            dtype=dtype,
            backend=backend,
            max_model_len=CONTEXT,
            max_num_seqs=MOST_LOAD,
            num_pages=pages,
        )
        self.plain = Baseline(open_checkpoint(model), dtype=self.llm.dtype, max_model_len=CONTEXT)
        self.facts = {
            "model": self.llm.name,
            "dtype": self.llm.dtype,
            "backend": self.llm.engine.step_fn.backend,
            "numerics_version": NUMERICS_VERSION,
            "fingerprint": fingerprint(self.llm),
        }
        """What the page says of itself."""

    def run(self, settings: Settings) -> Generator[Event]:
        """The events of a run: `start`, then per column `progress`, `answers` after every batch, `column` at its end.

        Raises:
            ValueError: at once, when the prompt is too long or no text.
        """
        llm, params = self.llm, settings.sampling
        prompt = llm.user_prompt(settings.prompt)
        ids = prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else llm.tokenizer.encode(str(prompt))
        if len(ids) > CONTEXT - settings.max_tokens:
            raise ValueError(
                f"prompt has {len(ids)} tokens and at most {CONTEXT - settings.max_tokens} fit; "
                "shorten it or lower max_tokens"
            )
        plan = batches(settings.completions, settings.load)
        columns = {
            "plain": plain_column(self.plain, ids, params, plan, llm.engine.eos_token_ids),
            "jaxdet": our_column(llm, ids, params, plan),
        }
        return self._events(plan, columns)

    def _events(self, plan: list[Batch], columns: dict[str, Generator[Progress]]) -> Generator[Event]:
        answers: dict[str, list[Answer]] = {name: [] for name in columns}
        yield {"event": "start", "batches": [batch._asdict() for batch in plan]}
        try:
            while columns:
                for name, column in list(columns.items()):
                    if (progress := next(column, None)) is None:
                        del columns[name]
                        yield {"event": "column", "column": name} | self._result(answers[name])
                    else:
                        yield {"event": "progress", "column": name, **_where(progress, plan)}
                        if progress.finished:
                            answers[name] += progress.finished
                            yield {"event": "answers", "column": name} | _count(answers[name])
        finally:
            for column in columns.values():
                column.close()

    def _result(self, answers: list[Answer]) -> Event:
        return {"digest": digest(answers), "tree": divergence_tree(answers, self.llm.tokenizer)}


def _where(progress: Progress, plan: list[Batch]) -> Event:
    size = plan[progress.batch].size if progress.batch < len(plan) else None
    return {"batch": progress.batch, "size": size, "step": progress.step}


def _count(answers: list[Answer]) -> Event:
    """How many different answers there are so far.

    `outputs` says for every answer which of the different ones it is, `bits` does for all logits. Tokens are counted
    from 1: `diverges_at` is the first that answers differ in, `bits_differ_at` the first whose logits do.
    """
    outputs: dict[tuple[int, ...], int] = {}
    digests: dict[str, int] = {}
    for answer in answers:
        outputs.setdefault(tuple(answer.tokens), len(outputs))
        digests.setdefault(answer.digest, len(digests))
    first = answers[0]
    diverges, moved = [], []
    for other in answers[1:]:
        pairs = zip(first.tokens, other.tokens, strict=False)
        end = next((at for at, (one, two) in enumerate(pairs) if one != two), None)
        shared = len(first.tokens) if end is None else end + 1
        diverges += [] if end is None else [end + 1]
        both = zip(first.bits[:shared], other.bits[:shared], strict=True)
        moved += [at + 1 for at, (one, two) in enumerate(both) if one != two][:1]
    return {
        "outputs": [outputs[tuple(answer.tokens)] for answer in answers],
        "bits": [digests[answer.digest] for answer in answers],
        "sizes": [answer.batch for answer in answers],
        "diverges_at": min(diverges, default=None),
        "bits_differ_at": min(moved, default=None),
    }
