"""The offline API: text or token ids in, completions out."""

import time
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxdet import certificates
from jaxdet.checkpoints import Checkpoint, open_checkpoint
from jaxdet.engine.compile_cache import use_compile_cache
from jaxdet.engine.digest import weights_digest
from jaxdet.engine.engine import NGRAM, Engine
from jaxdet.engine.memory import out_of_memory
from jaxdet.engine.sequence import Constraint
from jaxdet.engine.sequence import Sequence as EngineSequence
from jaxdet.engine.stats import EngineStats
from jaxdet.models.layers import DecoderLM
from jaxdet.models.registry import build_model, family_of
from jaxdet.outputs import RequestOutput, ScoreOutput
from jaxdet.request import Request
from jaxdet.sampling_params import SamplingParams
from pallas_kernels.backend import default_dtype

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt_token_ids": [...]} / {"prompt": "..."}."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class LLM:
    """A model with its tokenizer and engine; the same request gets the same bits, whatever else it runs.

    One thread at a time. Compiled programs are kept in jaxdet's cache folder ($JAXDET_CACHE), unless JAX's own
    compilation cache is set up.

    Args:
        model: a known name ("smollm2-135m"), a Hugging Face folder or id, a .gguf file, or an Orbax directory.
        dtype: "float32", "bfloat16" or "float16" of weights and activations; "auto" is float32 on a CPU, float16 on
            NVIDIA GPUs older than Ampere (a T4), and bfloat16 elsewhere.
        backend: which kernels; None takes the device's own.
        max_num_seqs: sequences running at once, 64 on a CPU and 256 elsewhere by default; more wait.
        max_num_batched_tokens: prompt tokens of one step, 512 on a CPU and 8192 elsewhere by default; longer prompts
            are chunked.
        max_model_len: tokens of prompt and output together; the model's own limit, at most 4096, by default.
        enable_prefix_caching: reuse the KV pages of prefixes seen before.
        enable_chunked_prefill: split prompts longer than max_num_batched_tokens; without it they must fit.
        tensor_parallel_size: devices that share the model; 1 for now.
        num_pages: KV pages of 128 tokens; None sizes the cache by itself.
        gpu_memory_utilization: share of the memory that JAX may use (XLA_PYTHON_CLIENT_MEM_FRACTION) which weights,
            cache and activations may take.
        speculative_model: who guesses tokens, which the model then verifies several at a time: "ngram" looks them up
            in the text so far, a model's name runs that (smaller) model. Outputs don't change by a bit.
        num_speculative_tokens: how many guesses one step verifies.
        num_scheduler_steps: decode steps that the device takes at once while no request needs the host in between, as
            penalties, grammars, logprobs, guesses and new prompts do. Saves host time; tokens come in bursts. By
            default 1 on a CPU, elsewhere 8 with less than 1 GB of weights, 4 with less than 4 GB, 2 with less than
            32 GB and 1 above.
        compile_at_start: compile every program before the first request (with a bar) instead of when it is needed;
            by default everywhere but on a CPU.
        seed: seed of requests that bring none.
        keep_logits: give every output token's logits in `CompletionOutput.logits` (for verification).

    Raises:
        ValueError: an argument is out of range or the checkpoint is not usable; one line, with the remedy.
        FileNotFoundError: there is no such model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        backend: str | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        tensor_parallel_size: int = 1,
        num_pages: int | None = None,
        gpu_memory_utilization: float = 0.9,
        speculative_model: str | Path | None = None,
        num_speculative_tokens: int = 4,
        num_scheduler_steps: int | None = None,
        compile_at_start: bool | None = None,
        seed: int = 0,
        keep_logits: bool = False,
    ):
        on_cpu = jax.default_backend() == "cpu"
        if max_num_seqs is None:
            max_num_seqs = 64 if on_cpu else 256
        if max_num_batched_tokens is None:
            max_num_batched_tokens = 512 if on_cpu else 8192
        if dtype == "auto":
            dtype = default_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)} or auto")
        for name, value, smallest in (
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 2),
            ("max_model_len", 2 if max_model_len is None else max_model_len, 2),
            ("num_pages", 2 if num_pages is None else num_pages, 2),
            ("num_speculative_tokens", num_speculative_tokens, 1),
            ("num_scheduler_steps", 1 if num_scheduler_steps is None else num_scheduler_steps, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {smallest}")
        SamplingParams(seed=seed)
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={gpu_memory_utilization!r} must be above 0 and at most 1"
            )
        if tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size!r}: models run on one device so far; use 1"
            )
        use_compile_cache()
        checkpoint = open_checkpoint(model, check_config=family_of)
        shape = family_of(checkpoint.config).read_config(checkpoint.config)
        limit = shape.max_position
        max_model_len = min(limit, 4096) if max_model_len is None else max_model_len
        if max_model_len > limit:
            raise ValueError(f"max_model_len={max_model_len} must be in [2, {limit}], the model's own limit")
        if not enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} is below max_model_len={max_model_len}; "
                "raise it or leave enable_chunked_prefill on"
            )
        self.name = checkpoint.name
        """What the model is called: its folder's, file's or hub's name."""
        self.dtype = dtype
        """Of weights and activations, by name."""
        self.max_model_len = max_model_len
        """Tokens of prompt and output together."""
        self.tokenizer = checkpoint.tokenizer()
        """Text to token ids and back, and the chat template."""
        network = _load(checkpoint, DTYPES[dtype], backend, max_model_len)
        certificates.say(self.name, network.backend, dtype)
        if num_scheduler_steps is None:
            num_scheduler_steps = 1 if on_cpu else steps_at_once(network)
        drafter = None
        if speculative_model == NGRAM:
            drafter = NGRAM
        elif speculative_model is not None:
            small = open_checkpoint(speculative_model, check_config=family_of)
            longest = family_of(small.config).read_config(small.config).max_position
            if max_model_len > longest:
                raise ValueError(
                    f"speculative_model={small.name!r} takes {longest} tokens, fewer than max_model_len="
                    f"{max_model_len}; lower max_model_len or use another model"
                )
            drafter = _load(small, DTYPES[dtype], backend, max_model_len)
        self._weights_digest: str | None = weights_digest(nnx.state(network))
        self.engine = Engine(
            network,
            salt=self._weights_digest,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_pages=num_pages,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            enable_chunked_prefill=enable_chunked_prefill,
            seed=seed,
            eos_token_ids=self.tokenizer.eos_token_ids,
            drafter=drafter,
            num_speculative_tokens=num_speculative_tokens,
            num_scheduler_steps=num_scheduler_steps,
            keep_logits=keep_logits,
        )
        if not on_cpu if compile_at_start is None else compile_at_start:
            with out_of_memory(
                f"a step of max_num_batched_tokens={max_num_batched_tokens} does not fit beside weights and KV cache; "
                "lower max_num_batched_tokens, max_num_seqs or gpu_memory_utilization"
            ):
                self.engine.compile_all(progress=True)
        self._live: dict[EngineSequence, Request] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the prompts' order.

        Args:
            prompts: one prompt or many, of any lengths.
            sampling_params: one for all, or one per prompt.
            use_tqdm: show a progress bar.
            priority: one number per prompt; lower goes first where not all can run at once.

        Raises:
            ValueError: there is no prompt; one is empty, too long or has ids outside the vocabulary; or the numbers of
                prompts, parameters and priorities differ. Nothing has run then.
        """
        listed = as_list(prompts)
        params = _one_each(sampling_params, len(listed))
        priorities = [0] * len(listed) if priority is None else list(priority)
        if len(priorities) != len(listed):
            raise ValueError(
                f"priority has {len(priorities)} entries for {len(listed)} prompts; give one per prompt"
            )
        encoded = [self._encode(prompt) for prompt in listed]
        requests: list[Request] = []
        try:
            for (text, ids), p, turn in zip(encoded, params, priorities, strict=True):
                requests.append(self._add(text, ids, p, turn))
            sequences = [s for r in requests for s in r.sequences]
            with tqdm(total=len(sequences), desc="Generating", unit="seq", disable=not use_tqdm) as bar:
                while (done := sum(s.finish_reason is not None for s in sequences)) < len(sequences):
                    bar.update(done - bar.n)
                    self.step()
                bar.update(done - bar.n)
        finally:
            for request in requests:
                self.abort(request)
        return [request.output() for request in requests]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or many, through the model's chat template.

        Args:
            messages: [{"role": "user", "content": "…"}, …], or a list of such lists.
            sampling_params, use_tqdm: as for `generate`.
            template: passed on to the chat template, such as tools=[…].

        Returns:
            One output per conversation.

        Raises:
            ValueError: as for `generate`; or the model has no chat template, or it refuses the messages.
        """
        if isinstance(messages, str | Mapping) or not messages:
            raise ValueError('messages must be a list such as [{"role": "user", "content": "…"}], not empty')
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(c, **template) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def user_prompt(self, text: str) -> Prompt:
        """The prompt of one user message: through the chat template if the model has one, else the text itself.

        Raises:
            ValueError: the text is empty, or the template refuses it.
        """
        if not text:
            raise ValueError("prompt is empty; give it at least one token")
        return self.chat_prompt([{"role": "user", "content": text}]) if self.tokenizer.chat_template else text

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> dict[str, Any]:
        """The prompt that `chat` would run: {"prompt": text, "prompt_token_ids": ids}.

        Args:
            messages: one conversation, [{"role": "user", "content": "…"}, …].
            template: passed on to the chat template.

        Raises:
            ValueError: a message has no role, the model has no chat template, or it refuses the messages.
        """
        return self.tokenizer.chat_prompt(messages, **template)

    def score(
        self, token_id_sequences: Sequence[Sequence[int]], *, use_tqdm: bool = False
    ) -> list[ScoreOutput]:
        """log p(token i + 1 | tokens 0…i) of given tokens, bit-equal to what the sampler reported for them.

        Args:
            token_id_sequences: one list of ids per sequence, each of up to max_model_len tokens.
            use_tqdm: show a progress bar.

        Returns:
            One output per sequence, with one logprob fewer than tokens.

        Raises:
            ValueError: there is no sequence, or one is empty, too long or has ids outside the vocabulary.
        """
        if len(token_id_sequences) == 0:
            raise ValueError("token_id_sequences is empty; give at least one list of token ids")
        requests: list[Request] = []
        try:
            for ids in token_id_sequences:
                requests.append(self.submit_score(ids))
            with tqdm(total=len(requests), desc="Scoring", unit="seq", disable=not use_tqdm) as bar:
                while (done := sum(r.finished for r in requests)) < len(requests):
                    bar.update(done - bar.n)
                    self.step()
                bar.update(done - bar.n)
        finally:
            for request in requests:
                self.abort(request)
        return [request.score() for request in requests]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yields the request's output after every dispatch; `.outputs[0].text` grows to `generate`'s text.

        The request ends when the loop over it does. Other requests go on meanwhile.
        """
        text, ids = self._encode(prompt)
        (params,) = _one_each(sampling_params, 1)
        request = self._add(text, ids, params)
        try:
            seen = None
            while True:
                # Another call may have run this request's steps in the meantime.
                state = [(s.num_output, s.finish_reason) for s in request.sequences]
                if state != seen and any(n or reason for n, reason in state):
                    yield request.output()
                    seen = state
                elif all(reason for _, reason in state):
                    return
                else:
                    self.step()
        finally:
            self.abort(request)

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queues a prompt among whatever runs already; `step` moves all requests on.

        Args:
            prompt: text, token ids or a dictionary, see `Prompt`.
            sampling_params: `SamplingParams()` by default.
            priority: lower goes first where not all can run at once; nobody waits for ever.
            constraint: which tokens each completion may go on with, such as `jaxdet.grammar` compiles.

        Raises:
            ValueError: the prompt is empty, too long or has ids outside the vocabulary; the priority is no whole
                number; or there is a constraint beside `min_tokens` or `ignore_eos`.
        """
        text, ids = self._encode(prompt)
        (params,) = _one_each(sampling_params, 1)
        return self._add(text, ids, params, priority, constraint)

    def submit_score(self, token_ids: Sequence[int]) -> Request:
        """Queues tokens whose logprobs are wanted; `Request.score` has them once it is finished.

        Raises:
            ValueError: they are none, too many or outside the vocabulary.
        """
        return self._watch(None, [self.engine.add_score(token_ids)], SamplingParams(prompt_logprobs=0))

    def step(self) -> list[Request]:
        """One step of the engine; returns the requests that got a token or ended. Stop strings end theirs here."""
        changed: dict[Request, None] = {}
        for sequence in self.engine.step():
            if (request := self._live.get(sequence)) is not None:
                try:
                    request.update(sequence)
                except Exception as error:  # the others' tokens of this step must not be lost
                    request.error = error
                    self.abort(request)
                if sequence.finish_reason is not None:
                    self._live.pop(sequence, None)
                changed[request] = None
        return list(changed)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is, and forgets it; no other one notices."""
        for sequence in request.sequences:
            self.engine.abort(sequence)
            self._live.pop(sequence, None)

    @property
    def params(self) -> nnx.State:
        """The parameters on the device, as the kernels read them; `update_weights` ends these arrays."""
        return self.engine.step_fn.params

    @property
    def weights_digest(self) -> str:
        """Digest of every bit of the weights, as hex; after `update_weights` it is computed when asked for."""
        if self._weights_digest is None:
            self._weights_digest = weights_digest(self.engine.step_fn.state)
        return self._weights_digest

    def update_weights(self, params: nnx.State) -> float:
        """Takes a trainer's parameters and forgets all cached prefixes; then it is as an LLM loaded with them.

        They are cast on the device by one program, into the memory of the present weights; `params` stays as it is.

        Args:
            params: the tree of `params`, packed alike, in any float dtype.

        Returns:
            The seconds it took.

        Raises:
            RuntimeError: requests are running or waiting.
            ValueError: a parameter is missing, surplus, of another shape or no float.
        """
        started = time.perf_counter()
        self.engine.update_params(params)
        self._weights_digest = None
        jax.block_until_ready(self.engine.step_fn.state)
        return time.perf_counter() - started

    def stats(self) -> EngineStats:
        """What the engine did so far: tokens, cache hits, preemptions, step times, compiled programs."""
        return self.engine.stats()

    def _add(
        self,
        text: str | None,
        ids: Sequence[int],
        params: SamplingParams,
        priority: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        queued = self.engine.add(ids, params, priority=priority, constraint=constraint)
        return self._watch(text, queued, params)

    def _watch(self, text: str | None, sequences: list[EngineSequence], params: SamplingParams) -> Request:
        request = Request(self.tokenizer, text, sequences, params, lambda s: self.engine.abort(s, "stop"))
        self._live |= dict.fromkeys(sequences, request)
        return request

    def _encode(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("prompt is empty; give it at least one token")
            return prompt, self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), prompt["prompt_token_ids"]
            if isinstance(prompt.get("prompt"), str):
                return self._encode(prompt["prompt"])
            raise ValueError(
                'prompt must hold "prompt" (text) or "prompt_token_ids"; got ' + str(list(prompt))
            )
        if not isinstance(prompt, Sequence | np.ndarray | jax.Array):
            raise ValueError(
                f"prompt={prompt!r} must be text, a list of token ids, or a dictionary of either"
            )
        return None, prompt


class _Watched:
    """A checkpoint whose reads move a progress bar."""

    def __init__(self, checkpoint: Checkpoint, bar: tqdm):
        self._checkpoint, self._bar = checkpoint, bar

    def read(self, name: str) -> np.ndarray:
        value = self._checkpoint.read(name)
        self._bar.update()
        return value


def steps_at_once(network: DecoderLM) -> int:
    """Decode steps that are worth one dispatch to an accelerator.

    The host needs about four milliseconds for a dispatch, the device as long as it takes to read the weights.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(network)))
    return 8 if size < 1e9 else 4 if size < 4e9 else 2 if size < 32e9 else 1


def _load(checkpoint: Checkpoint, dtype: jnp.dtype, backend: str | None, max_model_len: int) -> DecoderLM:
    """The model of a checkpoint, on the device; a bar shows its tensors."""
    count, name = len(checkpoint.tensors), f"Loading {checkpoint.name}"
    with (
        out_of_memory(
            f"the weights of {checkpoint.name} do not fit in {jnp.dtype(dtype).name}; use a smaller model, a dtype of "
            "16 bits, or give JAX more memory (XLA_PYTHON_CLIENT_MEM_FRACTION)"
        ),
        tqdm(total=count, desc=name, unit="tensor", disable=None, leave=False) as bar,
    ):
        source = _Watched(checkpoint, bar)
        return build_model(
            source, checkpoint.config, dtype=dtype, backend=backend, max_model_len=max_model_len
        )


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list.

    Raises:
        ValueError: there is none.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray | jax.Array):
        raise ValueError(f"prompts={prompts!r} must be a prompt or a list of prompts")
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    listed: list[Any] = list(prompts)
    return listed if isinstance(listed[0], str | Mapping) or np.ndim(listed[0]) else [listed]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Sequence) and all(isinstance(p, SamplingParams) for p in params):
        if len(params) == count:
            return params
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts; give one, or one per prompt"
        )
    raise ValueError(f"sampling_params={params!r} must be SamplingParams, or a list with one per prompt")
