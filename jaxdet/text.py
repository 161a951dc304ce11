"""Text of a growing completion, and the stop strings that end it."""

from collections.abc import Sequence

from jaxdet.sampling_params import SamplingParams
from jaxdet.tokenizer import DecodeStream, Tokenizer


class TextStream:
    """Decodes tokens as they come; `text` never holds half a character or the beginning of a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._tokenizer, self._params = tokenizer, params
        self._stream = DecodeStream(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = params.stop
        self._tokens: list[int] = []
        self._decoded = ""
        self._searched = 0
        """Where text that may complete a stop string begins: not before min_tokens."""
        self.text = ""
        self.stopped_by: str | None = None

    def extend(self, tokens: Sequence[int], start: int = 0) -> None:
        """Takes all tokens so far, from `start` on; decodes the new ones, up to one that completes a stop string."""
        for token in tokens[start + len(self._tokens) :]:
            if self.stopped_by is not None:
                break
            self._tokens.append(token)
            self._decoded += self._stream.step(token)
            if len(self._tokens) > self._params.min_tokens:
                self._find_stop()
            self._searched = len(self._decoded)
        if self.stopped_by is None:
            self.text = self._decoded[: len(self._decoded) - self._held()]

    @property
    def num_tokens(self) -> int:
        """How many tokens it has taken."""
        return len(self._tokens)

    def finish(self, *, drop_last: bool) -> None:
        """Settles the text: whatever was held back is decoded; `drop_last` leaves out the stop token that ended it."""
        tokens = self._tokens
        if drop_last and not self._params.include_stop_str_in_output:
            tokens = tokens[:-1]
        self.text = self._tokenizer.decode(tokens, skip_special_tokens=self._params.skip_special_tokens)

    def _find_stop(self) -> None:
        found = []
        for stop in self._stops:
            at = self._decoded.find(stop, max(0, self._searched - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if found:
            at, stop = min(found)
            self.stopped_by = stop
            self.text = self._decoded[: at + len(stop) * self._params.include_stop_str_in_output]

    def _held(self) -> int:
        """Characters at the end that may become a stop string; they are shown once they don't."""
        if self._params.include_stop_str_in_output:
            return 0
        longest = max((len(s) - 1 for s in self._stops), default=0)
        for n in range(min(longest, len(self._decoded)), 0, -1):
            if any(stop.startswith(self._decoded[-n:]) for stop in self._stops):
                return n
        return 0
