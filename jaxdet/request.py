"""A submitted prompt: what its completions have got so far, as text and outputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from jaxdet.engine.sequence import Entry
from jaxdet.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
from jaxdet.sampling_params import SamplingParams
from jaxdet.text import TextStream
from jaxdet.tokenizer import Tokenizer


class Progress(Protocol):
    """A growing completion: the engine's own, or what another process was told of it."""

    request_id: str
    prompt: list[int]
    sample_index: int
    tokens: list[int]
    """The prompt's, then the output's."""
    cached: int
    finish_reason: str | None
    stop_reason: int | None
    logprobs: list[Entry]
    prompt_logprobs: list[Entry]
    logits: list[np.ndarray]


class Request[P: Progress]:
    """A prompt's sequences and their text so far.

    Args:
        tokenizer: the model's.
        prompt: its text, if it came as text.
        sequences: its `params.n` completions.
        abort: ends a sequence that a stop string ended.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str | None,
        sequences: Sequence[P],
        params: SamplingParams,
        abort: Callable[[P], None],
    ):
        self._tokenizer, self._prompt, self._params, self._abort = tokenizer, prompt, params, abort
        self.sequences = sequences
        self.error: Exception | None = None
        """What went wrong with its text; it is aborted then, and its outputs raise it."""
        self._text = {s: TextStream(tokenizer, params) for s in sequences}
        self._told: dict[P, tuple[int, int, str | None]] = dict.fromkeys(sequences, (0, 0, None))
        """Tokens, characters and finish reason that `news` has told of."""

    @property
    def finished(self) -> bool:
        """Whether all of its sequences have ended."""
        return all(s.finish_reason is not None for s in self.sequences)

    def update(self, sequence: P) -> None:
        """Looks for a stop string in new tokens; without one, text is decoded when it is asked for."""
        if not self._params.stop:
            return
        stream = self._text[sequence]
        stream.extend(sequence.tokens, len(sequence.prompt))
        if stream.stopped_by is not None and sequence.finish_reason != "abort":
            self._abort(sequence)
            sequence.finish_reason = "stop"
            # Where several tokens come at once, some may follow the one that completed the stop string.
            count = stream.num_tokens
            del sequence.tokens[len(sequence.prompt) + count :]
            del sequence.logprobs[count:], sequence.logits[count:]

    def output(self) -> RequestOutput:
        """All of it so far."""
        return self._output([self._completion(s) for s in self.sequences])

    def news(self) -> RequestOutput:
        """The output, but of its completions only those that got tokens or ended since the last call, and only that."""
        found = []
        for s in self.sequences:
            tokens, characters, reason = self._told[s]
            count = len(s.tokens) - len(s.prompt)
            if (count, s.finish_reason) != (tokens, reason):
                completion = self._completion(s, tokens)
                self._told[s] = count, len(completion.text), s.finish_reason
                completion.text = completion.text[characters:]
                found.append(completion)
        return self._output(found)

    def score(self) -> ScoreOutput:
        """Logprobs of the prompt's tokens from the second on."""
        (sequence,) = self.sequences
        return ScoreOutput(sequence.prompt, [entry[0] for entry in sequence.prompt_logprobs])

    def _output(self, completions: list[CompletionOutput]) -> RequestOutput:
        if self.error is not None:
            raise self.error
        first, p = self.sequences[0], self._params
        prompt_logprobs = None
        if p.prompt_logprobs is not None:
            entries = zip(first.prompt[1:], first.prompt_logprobs, strict=False)
            prompt_logprobs = [None, *(self._logprobs(token, entry) for token, entry in entries)]
        return RequestOutput(
            first.request_id,
            self._prompt,
            first.prompt,
            completions,
            prompt_logprobs,
            first.cached,
        )

    def _completion(self, s: P, start: int = 0) -> CompletionOutput:
        """The whole text, and tokens and what belongs to them from `start` on."""
        stream, wanted = self._text[s], self._params.logprobs is not None
        new = s.tokens[len(s.prompt) + start :]
        stream.extend(s.tokens, len(s.prompt))
        if s.finish_reason is not None and stream.stopped_by is None:
            stream.finish(drop_last=s.finish_reason == "stop")
        return CompletionOutput(
            index=s.sample_index,
            text=stream.text,
            token_ids=new,
            cumulative_logprob=sum((e[0] for e in s.logprobs), 0.0) if wanted else None,
            logprobs=[self._logprobs(t, e) for t, e in zip(new, s.logprobs[start:], strict=True)]
            if wanted
            else None,
            finish_reason=s.finish_reason,
            stop_reason=stream.stopped_by or s.stop_reason,
            logits=np.stack(s.logits) if s.logits else None,
        )

    def _logprobs(self, token: int, entry: Entry) -> dict[int, Logprob]:
        logprob, rank, top, top_ids = entry
        decode = functools.partial(self._tokenizer.decode, skip_special_tokens=False)
        found = {token: Logprob(logprob, rank, decode([token]))}
        for place, (value, other) in enumerate(zip(top, top_ids, strict=True), 1):
            found.setdefault(other, Logprob(value, place, decode([other])))
        return found
