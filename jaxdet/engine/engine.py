"""The engine: token ids in, token ids out; requests join and leave a running batch."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdet.engine import batch as arrays
from jaxdet.engine.buckets import Bucket, Buckets
from jaxdet.engine.drafting import Drafter, ModelDrafter, NgramDrafter
from jaxdet.engine.kv_cache import PagePool
from jaxdet.engine.larger_tiles import prove
from jaxdet.engine.memory import out_of_memory, plan_pages
from jaxdet.engine.scheduler import Part, Plan, Scheduler
from jaxdet.engine.sequence import Constraint, Entry, Sequence
from jaxdet.engine.stats import Counters, EngineStats
from jaxdet.engine.step import Logprobs, Step, StepOutput
from jaxdet.engine.wanted import COPY_BUCKETS, Programs, Wanted
from jaxdet.engine.warm_up import compile_all
from jaxdet.models.layers import Batch, DecoderLM
from jaxdet.sampling_params import MAX_LOGPROBS, SamplingParams
from pallas_kernels.numerics import PAGE_SIZE, TRASH_PAGE

FEWEST_PREFILL_SEQS = 8
OVERTAKING = 1000
"""How many later requests one step of priority may overtake: everybody's turn comes."""
NGRAM = "ngram"
UNUSABLE: Entry = (float("nan"), 0, [], [])
"""Of every prompt token of a sequence that ends in an error, if its log-probabilities were asked for."""


class Flight(NamedTuple):
    """A step that was handed to the device."""

    plan: Plan
    bucket: Bucket
    out: StepOutput
    started: float


class Engine:
    """Continuous batching over a paged KV cache.

    While the device runs a step, the host prepares the next one: a token goes from step to step on the device, and
    the host sees it one step later. A sequence that turns out to have ended has then run some steps too many, which
    nobody sees.

    Args:
        model: the model, on its device.
        salt: digest of the weights; part of every prefix hash.
        max_model_len: tokens a sequence may have, prompt and output together.
        max_num_seqs: sequences running at once.
        max_num_batched_tokens: prompt tokens of one step.
        num_pages: pages of the KV cache; None gives every running sequence room for `max_model_len`, within 1 GiB on
            a CPU and `gpu_memory_utilization` elsewhere.
        gpu_memory_utilization: share of the memory that JAX may use (XLA_PYTHON_CLIENT_MEM_FRACTION) for everything.
        seed: the seed of requests that bring none.
        drafter: "ngram", a small model with the same vocabulary, or None: who guesses tokens.
        num_speculative_tokens: how many guesses one step verifies.
        num_scheduler_steps: decode steps that the device takes at once while no request needs the host in between
            (penalties, grammars, logprobs, prompts and drafts do). Where the device is faster than the host that is
            what limits; tokens come in bursts then.
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
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        seed: int = 0,
        eos_token_ids: Tokens[int] = (),
        drafter: DecoderLM | str | None = None,
        num_speculative_tokens: int = 4,
        num_scheduler_steps: int = 1,
        keep_logits: bool = False,
    ):
        self.max_model_len, self.seed = max_model_len, seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.keep_logits = keep_logits
        self._drafts = num_speculative_tokens if drafter is not None else 0
        self._steps = num_scheduler_steps if drafter is None else 1
        self._table = -(-max_model_len // PAGE_SIZE)
        prompts = max(FEWEST_PREFILL_SEQS, max_num_batched_tokens // PAGE_SIZE)
        rows = max_num_seqs * (1 + self._drafts)
        self.buckets = Buckets(rows, max_num_batched_tokens, prompts, model.backend)
        self.step_fn = self._step_of(model)
        if num_pages is None:
            num_pages = plan_pages(
                model.config,
                self.buckets,
                np.dtype(model.dtype).itemsize,
                model.backend,
                table=self._table,
                wanted=max_num_seqs * self._table,
                utilization=gpu_memory_utilization,
            )
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
            max_prefill_seqs=prompts,
            max_mixed_rows=self.buckets.most_mixed_rows,
            chunked=enable_chunked_prefill,
            early=model.backend != "mosaic_gpu",
        )
        self._slots = max_num_seqs
        with out_of_memory(
            f"the KV cache of num_pages={num_pages} does not fit beside the weights; lower num_pages or "
            "gpu_memory_utilization, or give JAX more memory (XLA_PYTHON_CLIENT_MEM_FRACTION)"
        ):
            self._drafter = self._make_drafter(drafter)
            self._reset_device()
        self._ids = itertools.count()
        self._arrivals = itertools.count()
        self._flights: collections.deque[Flight] = collections.deque()
        self._interrupted = False
        self._counters = Counters()
        self._compiled_at_start = self._compiled

    def _step_of(self, model: DecoderLM) -> Step:
        return Step(model, prove(model, self.buckets.all()))

    def _make_drafter(self, drafter: DecoderLM | str | None) -> Drafter | None:
        if drafter is None:
            return None
        if isinstance(drafter, str):
            if drafter != NGRAM:
                raise ValueError(f"drafter={drafter!r} is unknown; use {NGRAM!r} or a model")
            return NgramDrafter()
        if drafter.config.vocab_size != self.vocab_size:
            raise ValueError(
                f"the drafter has {drafter.config.vocab_size} tokens and the model {self.vocab_size}; "
                "use a drafter of the same family"
            )
        return ModelDrafter(
            self._step_of(drafter),
            self.buckets,
            num_pages=self.pool.num_pages,
            table=self._table,
            slots=self._slots,
        )

    def _reset_device(self) -> None:
        self._cache = self.step_fn.new_cache(self.pool.num_pages, PAGE_SIZE)
        self._last_tokens = jnp.zeros(self._slots, jnp.int32)

    def add(
        self,
        prompt: Tokens[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> list[Sequence]:
        """Queues a prompt; returns its `params.n` sequences, which fill up as `step` is called.

        Args:
            priority: lower goes first; one step overtakes at most OVERTAKING earlier requests.
            constraint: which tokens each completion may go on with; it is copied.

        Raises:
            ValueError: the prompt is empty, too long, or has ids outside the vocabulary, the priority is no whole
                number, or what `params` ban may be all that the constraint allows.
        """
        ids = self._check_prompt(prompt, self.max_model_len - 1)
        if not isinstance(priority, Integral):
            raise ValueError(f"priority={priority!r} must be a whole number; lower goes first")
        self._check_vocabulary("logit_bias", params.logit_bias)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        request_id = request_id or str(next(self._ids))
        room = self.max_model_len - len(ids)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        if constraint is not None and (not eos or params.min_tokens):
            raise ValueError(
                "min_tokens and ignore_eos forbid the end that a constrained completion comes to; leave them out, "
                "and use a model with an end-of-sequence token"
            )
        grammar = constraint and constraint.copy()
        alike = params
        if params.n > 1 and params.prompt_logprobs is not None:  # they are asked of the first one
            alike = dataclasses.replace(params, prompt_logprobs=None)
        return [
            self._queue(
                request_id=request_id,
                prompt=ids,
                params=alike if index else params,
                sample_index=index,
                seed=self.seed if params.seed is None else params.seed,
                max_tokens=min(room, params.max_tokens or room),
                stop_ids=eos | frozenset(params.stop_token_ids),
                grammar=grammar,
                order=next(self._arrivals) + OVERTAKING * priority,
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
            order=next(self._arrivals),
        )

    def _queue(self, **fields: Any) -> Sequence:
        sequence = Sequence(keep_logits=self.keep_logits, **fields)
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
        vocab = self.vocab_size
        if (bad := next((t for t in ids if not 0 <= t < vocab), None)) is not None:
            raise ValueError(f"{name} holds {bad}, outside the vocabulary [0, {vocab}); check the tokenizer")

    @property
    def vocab_size(self) -> int:
        """The model's number of logits."""
        return self.step_fn.config.vocab_size

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def abort(self, sequence: Sequence, reason: str = "abort") -> None:
        """Ends a sequence from outside (a stop string, a closed connection)."""
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
            self._counters.cancelled += reason == "abort"
            self._counters.finished += reason != "abort"
            self.scheduler.finish(sequence)

    def step(self) -> list[Sequence]:
        """Hands one step to the device and takes in the one before; returns the sequences that got a token or ended.

        Whatever it raises, the engine stays usable: running sequences start over, to the same bits.
        """
        if self._interrupted:
            self._recover()
        try:
            changed: list[Sequence] = []
            if self._flights and (self._drafter or any(s.needs_last_token for s in self.scheduler.running)):
                changed += self._collect(self._flights.popleft())
            plan = self.scheduler.schedule(self._propose(), self._steps)
            if plan.copies:
                self._copy(plan.copies)
            if plan:
                self._flights.append(self._dispatch(plan))
            if self._flights and (not plan or len(self._flights) > 1):
                changed += self._collect(self._flights.popleft())
            return changed
        except BaseException:
            self._interrupted = True
            self._recover()
            raise

    def _recover(self) -> None:
        """Everybody starts over: the cache may have been donated to a step that failed. The next step does it if this
        is interrupted, too."""
        self._flights.clear()
        self.scheduler.restart()
        self._reset_device()
        if self._drafter:
            self._drafter.reset()
        self._interrupted = False

    def update_params(self, params: nnx.State) -> None:
        """Takes other weights, cast into the memory of the present ones, and forgets all cached prefixes.

        Raises:
            RuntimeError: requests are running or waiting; they would go on with other weights than they began with.
            ValueError: `params` doesn't fit the model.
        """
        if self.has_work:
            count = len(self.scheduler.running) + len(self.scheduler.waiting)
            raise RuntimeError(f"{count} sequences are running or waiting; finish or abort them, then update")
        self.step_fn.update_params(params)
        self.pool.clear()

    def compile_all(self, *, progress: bool = False) -> None:
        """Compiles every program that a request may need, so that none has to wait for one.

        Args:
            progress: show a bar.
        """
        compile_all(self.wanted, progress=progress)
        self._compiled_at_start = self._compiled

    @property
    def wanted(self) -> Wanted:
        """Every program that a request may need."""
        target = Programs(self.step_fn, self._cache, self._last_tokens)
        drafter = self._drafter.programs if isinstance(self._drafter, ModelDrafter) else None
        return Wanted(target, drafter, self.buckets, self._table, self._steps)

    @property
    def _compiled(self) -> int:
        """Programs compiled so far, the drafter's included."""
        drafter = self._drafter.programs[0].compiled if isinstance(self._drafter, ModelDrafter) else 0
        return self.step_fn.compiled + drafter

    def stats(self) -> EngineStats:
        """Tallies and rates; cheap enough to ask for at every step."""
        c, scheduler = self._counters, self.scheduler
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=c.finished,
            cancelled=c.cancelled,
            failed=c.failed,
            steps=c.steps,
            prompt_tokens=c.prompt_tokens,
            cached_tokens=c.cached_tokens,
            output_tokens=c.output_tokens,
            preemptions=scheduler.preemptions,
            drafted_tokens=c.drafted_tokens,
            accepted_tokens=c.accepted_tokens,
            pages=self.pool.num_pages - 1,
            pages_in_use=self.pool.num_pages - 1 - self.pool.available,
            compiled_programs=self._compiled,
            compiled_after_start=self._compiled - self._compiled_at_start,
            **c.rates(),
        )

    def _propose(self) -> dict[Sequence, list[int]]:
        if not self._drafter:
            return {}
        limits = {}
        for s in self.scheduler.running:
            limit = min(self._drafts, s.max_tokens - s.num_output - 1, self.max_model_len - s.length - 1)
            if s.pending == 1 and limit > 0:
                limits[s] = limit
        return self._drafter.propose(limits)

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        for at in range(0, len(copies), COPY_BUCKETS[-1]):
            some = copies[at : at + COPY_BUCKETS[-1]]
            size = next(bucket for bucket in COPY_BUCKETS if bucket >= len(some))
            some += [(TRASH_PAGE, TRASH_PAGE)] * (size - len(some))
            sources, targets = np.asarray(some, np.int32).T.copy()
            self._cache = self.step_fn.copy_pages(self._cache, sources, targets)
            if self._drafter:
                self._drafter.copy_pages(sources, targets)

    def _dispatch(self, plan: Plan) -> Flight:
        started = time.perf_counter()
        rows = sum(part.count for part in plan.rows)
        bucket = self.buckets.fit(rows, sum(part.count for part in plan.chunks), len(plan.chunks))
        batch, feed = arrays.model_batch(plan, bucket, self._table)
        compute = self._decode if plan.steps > 1 else self._run
        out = compute(plan, bucket, batch, feed)
        for array in jax.tree.leaves(out):
            array.copy_to_host_async()
        return Flight(plan, bucket, out, started)

    def _run(self, plan: Plan, bucket: Bucket, batch: Batch, feed: np.ndarray) -> StepOutput:
        """One step of any kind."""
        step = self.step_fn
        hidden, logits, self._cache = step.run(self._cache, self._last_tokens, feed, batch)
        if self._drafter:
            self._drafter.follow(batch)
        chosen = arrays.sampled(plan, bucket)
        adjusted = logits
        for adjustments in arrays.adjustments(chosen, bucket.sampled, self.vocab_size):
            adjusted = step.adjust(adjusted, adjustments)
        allowed = arrays.allowed_tokens(chosen, bucket.sampled, self.vocab_size)
        adjusted = adjusted if allowed is None else step.restrict(adjusted, allowed)
        slots = arrays.slots_of(chosen, bucket.sampled, self._slots)
        sampling = arrays.sampling_rows(chosen, bucket.sampled)
        tokens, usable, self._last_tokens = step.draw(adjusted, sampling, slots, self._last_tokens)
        scored = any(part.sequence.unscored for part in plan)
        top = min(MAX_LOGPROBS, self.vocab_size)
        logprobs = prompt_logprobs = None
        if any(part.sequence.params.logprobs is not None for part, _ in chosen):
            logprobs = step.logprobs(logits, tokens, top=top)
        if scored:
            prompt_logprobs = step.score(hidden, arrays.targets(plan, bucket), top=top)
        kept = logits if any(part.sequence.keep_logits for part, _ in chosen) else None
        return StepOutput(tokens, usable, kept, logprobs, prompt_logprobs)

    def _decode(self, plan: Plan, bucket: Bucket, batch: Batch, feed: np.ndarray) -> StepOutput:
        """Several steps in a row."""
        chosen = arrays.sampled(plan, bucket)
        sampling = arrays.sampling_rows(chosen, bucket.rows)
        counts, slots = arrays.steps_of(plan, bucket), arrays.slots_of(chosen, bucket.rows, self._slots)
        tokens, usable, self._last_tokens, self._cache = self.step_fn.decode(
            self._cache, self._last_tokens, feed, batch, counts, sampling, slots, steps=plan.steps
        )
        return StepOutput(tokens, usable, None, None, None)

    def _collect(self, flight: Flight) -> list[Sequence]:
        """Waits for a step's results and gives every sequence its own."""
        plan, bucket = flight.plan, flight.bucket
        if all(part.sequence.finish_reason is not None for part in plan):
            return []
        out = jax.device_get(flight.out)
        changed, count = [], 0
        if out.prompt_logprobs is not None:
            for part, first in arrays.placed(plan, bucket):
                if part.sequence.finish_reason is None:
                    self._take_prompt_logprobs(part, first, out.prompt_logprobs)
        tokens, usable = out.tokens.tolist(), out.usable.tolist()
        for part, row in arrays.sampled(plan, bucket):
            # This loop runs for every sequence at every step.
            sequence = part.sequence
            sequence.in_flight -= part.steps + len(part.drafts)
            if sequence.finish_reason is not None:
                continue
            before = len(sequence.tokens)
            if before == len(sequence.prompt):
                self._counters.prompt_tokens += before
                self._counters.cached_tokens += sequence.cached
            if plan.steps > 1:
                _take_steps(part, row, tokens, usable)
            else:
                self._take_tokens(part, row, tokens, usable, out)
            count += len(sequence.tokens) - before
            if len(sequence.tokens) >= sequence.register_at:
                self.scheduler.register(sequence)
            changed.append(sequence)
            if sequence.finish_reason is not None:
                failed = sequence.finish_reason == "error"
                self._counters.failed += failed
                self._counters.finished += not failed
                if failed and sequence.prompt_logprobs:
                    # A NaN may have reached tokens before it, those of its tile in whatever chunk it came.
                    sequence.prompt_logprobs = [UNUSABLE] * (len(sequence.prompt) - 1)
                self.scheduler.finish(sequence)
        self._counters.step_done(flight.started, count, plan.steps)
        return changed

    def _take_tokens(
        self, part: Part, row: int, tokens: list[int], usable: list[bool], out: StepOutput
    ) -> None:
        """The sampled token, and after every right guess the next one."""
        sequence, before = part.sequence, len(part.sequence.tokens)
        for guess in (*part.drafts, None):
            if not usable[row] or sequence.broken:
                sequence.finish_reason = "error"
            elif sequence.max_tokens == 0:
                sequence.finish_reason = "length"
            else:
                if out.logprobs is not None and sequence.params.logprobs is not None:
                    sequence.logprobs.append(_entry(out.logprobs, row, sequence.params.logprobs))
                if out.logits is not None and sequence.keep_logits:
                    sequence.logits.append(np.asarray(out.logits[row]))
                sequence.append(tokens[row])
            if sequence.finish_reason is not None or sequence.tokens[-1] != guess:
                break
            row += 1
        if part.drafts:
            taken = len(sequence.tokens) - before
            self._counters.drafted_tokens += len(part.drafts)
            self._counters.accepted_tokens += max(0, taken - 1)
            if sequence.slot >= 0:  # what follows a wrong guess was computed for nothing
                sequence.computed = part.start + taken

    def _take_prompt_logprobs(self, part: Part, first: int, found: Logprobs) -> None:
        sequence = part.sequence
        if sequence.unscored:
            top, known = sequence.params.prompt_logprobs or 0, len(sequence.prompt_logprobs)
            end = min(part.start + part.count, len(sequence.prompt) - 1)
            sequence.prompt_logprobs += [
                _entry(found, first + at - part.start, top) for at in range(known, end)
            ]


def _take_steps(part: Part, row: int, tokens: list[list[int]], usable: list[list[bool]]) -> None:
    """The tokens of several steps, up to the one that ends the sequence."""
    sequence = part.sequence
    for step in range(part.steps):
        if not usable[step][row]:
            sequence.finish_reason = "error"
        else:
            sequence.append(tokens[step][row])
        if sequence.finish_reason is not None:
            break


def _entry(logprobs: Logprobs, row: int, top: int) -> Entry:
    return (
        float(logprobs.logprob[row]),
        int(logprobs.rank[row]),
        logprobs.top[row, :top].tolist(),
        logprobs.top_ids[row, :top].tolist(),
    )
