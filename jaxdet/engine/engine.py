"""The engine: token ids in, token ids out; requests join and leave a running batch."""

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from typing import Any

import jax
import numpy as np

from jaxdet.engine.batch import Work, model_batch, sampling_rows
from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.scheduler import Scheduler
from jaxdet.engine.sequence import Sequence
from jaxdet.engine.step import Logprobs, Step, StepOutput
from jaxdet.models.layers import DecoderLM
from jaxdet.sampling_params import MAX_LOGPROBS, SamplingParams
from pallas_kernels.numerics import PAGE_SIZE

MAX_PREFILL_SEQS = 8
CACHE_BYTES = 2**30
"""Size limit of the cache where the device doesn't tell its memory (a CPU)."""
CACHE_SHARE = 0.8
"""Share of the memory left beside the weights that the cache may take elsewhere."""


class Engine:
    """Continuous batching over a paged KV cache.

    Args:
        model: the model, on its device.
        salt: digest of the weights; part of every prefix hash.
        max_model_len: tokens a sequence may have, prompt and output together.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: tokens of one prefill step.
        num_pages: pages of the KV cache; None gives every running sequence room for `max_model_len`, within 1 GiB on
            a CPU and within 80 % of the free memory elsewhere.
        seed: the seed of requests that bring none.
        keep_logits: keep every sampled token's logits on its sequence (for verification).
    """

    def __init__(
        self,
        model: DecoderLM,
        *,
        salt: str,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_pages: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        seed: int = 0,
        eos_token_ids: Tokens[int] = (),
        keep_logits: bool = False,
    ):
        self.step_fn = Step(model)
        self.max_model_len, self.seed = max_model_len, seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.keep_logits = keep_logits
        self._table = -(-max_model_len // PAGE_SIZE)
        num_pages = self._default_pages(max_num_seqs) if num_pages is None else num_pages
        if num_pages < self._table + 1:
            raise ValueError(
                f"num_pages={num_pages} holds no sequence of max_model_len={max_model_len}; "
                f"use at least {self._table + 1} or a smaller max_model_len"
            )
        self.pool = PagePool(num_pages, salt, enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_prefill_seqs=MAX_PREFILL_SEQS,
            chunked=enable_chunked_prefill,
        )
        self._num_pages = num_pages
        self._cache = self.step_fn.new_cache(num_pages, PAGE_SIZE)
        self._ids = itertools.count()

    def add(
        self, prompt: Tokens[int], params: SamplingParams, request_id: str | None = None
    ) -> list[Sequence]:
        """Queues a prompt; returns its `params.n` sequences, which fill up as `step` is called.

        Raises:
            ValueError: the prompt is empty, too long, or has ids outside the vocabulary.
        """
        ids = self._check_prompt(prompt, self.max_model_len - 1)
        self._check_vocabulary("logit_bias", params.logit_bias)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        request_id = request_id or str(next(self._ids))
        room = self.max_model_len - len(ids)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return [
            self._queue(
                request_id=request_id,
                prompt=ids,
                params=params,
                sample_index=index,
                seed=self.seed if params.seed is None else params.seed,
                max_tokens=min(room, params.max_tokens or room),
                stop_ids=eos | frozenset(params.stop_token_ids),
            )
            for index in range(params.n)
        ]

    def add_score(self, token_ids: Tokens[int]) -> Sequence:
        """Queues tokens whose `prompt_logprobs` are wanted and nothing else; up to `max_model_len` of them.

        Raises:
            ValueError: as for `add`.
        """
        return self._queue(
            request_id=str(next(self._ids)),
            prompt=self._check_prompt(token_ids, self.max_model_len),
            params=SamplingParams(prompt_logprobs=0, temperature=0),
            sample_index=0,
            seed=self.seed,
            max_tokens=0,
            stop_ids=frozenset(),
        )

    def _queue(self, **fields: Any) -> Sequence:
        sequence = Sequence(**fields)
        self.scheduler.add(sequence)
        return sequence

    def _check_prompt(self, prompt: Tokens[int], longest: int) -> list[int]:
        ids = np.asarray(prompt)
        if ids.size == 0:
            raise ValueError("prompt is empty; give it at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                "prompt_token_ids must be a flat list of integers; encode text with the tokenizer"
            )
        if len(ids) > longest:
            for_output = ", one of them for the output" if longest < self.max_model_len else ""
            raise ValueError(
                f"prompt has {len(ids)} tokens but max_model_len is {self.max_model_len}{for_output}; "
                "shorten the prompt or raise max_model_len"
            )
        self._check_vocabulary("prompt_token_ids", ids.tolist())
        return ids.tolist()

    def _check_vocabulary(self, name: str, ids: Iterable[int]) -> None:
        vocab = self.step_fn.config.vocab_size
        if (bad := next((t for t in ids if not 0 <= t < vocab), None)) is not None:
            raise ValueError(f"{name} holds {bad}, outside the vocabulary [0, {vocab}); check the tokenizer")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence from outside (a stop string, a closed connection)."""
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
            self.scheduler.finish(sequence)

    def step(self) -> list[Sequence]:
        """Runs one step; returns the sequences that got a token or ended.

        Whatever it raises, the engine stays usable: running sequences start over, to the same bits.
        """
        try:
            work = self.scheduler.schedule()
            return self._run(work) if work else []
        except BaseException:
            # The cache may have been donated to a step that failed.
            self.scheduler.restart()
            self._cache = self.step_fn.new_cache(self._num_pages, PAGE_SIZE)
            raise

    def _run(self, work: Work) -> list[Sequence]:
        batch = model_batch(
            work,
            max_prefill_seqs=self.scheduler.max_prefill_seqs,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_tokens=self.scheduler.max_num_batched_tokens,
            table=self._table,
        )
        rows = sampling_rows(work, batch.seq_lens.shape[0], self.step_fn.config.vocab_size)
        scored = any(s.unscored for s, _ in work)
        wanted = any(s.params.logprobs is not None for s, _ in work) or scored
        out, self._cache = self.step_fn.run(
            self._cache,
            batch,
            rows,
            targets=_targets(work, batch.tokens.shape[0]) if scored else None,
            top_logprobs=min(MAX_LOGPROBS, self.step_fn.config.vocab_size) if wanted else None,
        )
        if not self.keep_logits:
            out = out._replace(logits=None)
        return self._collect(work, np.asarray(batch.query_start), jax.device_get(out))

    def _collect(self, work: Work, starts: np.ndarray, out: StepOutput) -> list[Sequence]:
        changed = []
        for row, (sequence, count) in enumerate(work):
            first = sequence.computed
            self.scheduler.computed(sequence, count)
            if out.prompt_logprobs is not None and sequence.unscored:
                known = len(sequence.prompt_logprobs)
                sequence.prompt_logprobs += [
                    _entry(
                        out.prompt_logprobs, starts[row] + at - first, sequence.params.prompt_logprobs or 0
                    )
                    for at in range(known, min(first + count, len(sequence.prompt) - 1))
                ]
            if sequence.pending:
                continue
            changed.append(sequence)
            if not out.usable[row]:
                sequence.finish_reason = "error"
            elif sequence.max_tokens == 0:
                sequence.finish_reason = "length"
            else:
                if sequence.params.logprobs is not None and out.logprobs is not None:
                    sequence.logprobs.append(_entry(out.logprobs, row, sequence.params.logprobs))
                if out.logits is not None:
                    sequence.logits.append(np.asarray(out.logits[row]))
                sequence.append(int(out.tokens[row]))
            if sequence.finish_reason is not None:
                self.scheduler.finish(sequence)
        return changed

    def _default_pages(self, max_num_seqs: int) -> int:
        c = self.step_fn.config
        page_bytes = (
            2 * c.num_layers * c.num_kv_heads * PAGE_SIZE * c.head_dim * np.dtype(self.step_fn.dtype).itemsize
        )
        memory = jax.local_devices()[0].memory_stats()
        budget = CACHE_BYTES
        if memory and "bytes_limit" in memory:
            budget = int(CACHE_SHARE * (memory["bytes_limit"] - memory["bytes_in_use"]))
        return max(self._table, min(max_num_seqs * self._table, budget // page_bytes)) + 1


def _targets(work: Work, size: int) -> np.ndarray:
    """The token after each of a step's tokens."""
    following = np.concatenate([[*s.tokens, 0][s.computed + 1 : s.computed + n + 1] for s, n in work])
    return np.pad(following, (0, size - len(following))).astype(np.int32)


def _entry(logprobs: Logprobs, row: int, top: int) -> tuple[float, int, np.ndarray, np.ndarray]:
    return (
        float(logprobs.logprob[row]),
        int(logprobs.rank[row]),
        np.asarray(logprobs.top[row, :top]),
        np.asarray(logprobs.top_ids[row, :top]),
    )
