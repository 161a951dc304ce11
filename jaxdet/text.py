"""Text of a growing completion, and the stop strings that end it."""

from collections.abc import Sequence

from jaxdet.sampling_params import SamplingParams
from jaxdet.tokenizer import DecodeStream, Tokenizer


class TextStream:
    """Decodes tokens as they come; never half a character, never part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._tokenizer, self._params = tokenizer, params
        self._stream = DecodeStream(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._seen: list[int] = []
        self.text = ""
        self.stopped_by: str | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes all tokens so far; decodes the new ones."""
        for token in tokens[len(self._seen) :]:
            self._seen.append(token)
            before = len(self.text)
            self.text += self._stream.step(token)
            self._find_stop(before)

    def finish(self, *, drop_last: bool) -> None:
        """Settles the text: whatever the stream held back is decoded, an ending stop token is left out."""
        tokens = self._seen[:-1] if drop_last else self._seen
        self.text = self._tokenizer.decode(tokens, skip_special_tokens=self._params.skip_special_tokens)

    def _find_stop(self, before: int) -> None:
        found = []
        for stop in self._params.stop:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                found.append((at, stop))
        if found:
            at, stop = min(found)
            self.stopped_by = stop
            self.text = self.text[: at + len(stop) * self._params.include_stop_str_in_output]
