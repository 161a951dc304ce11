"""What the engine has done so far."""

import dataclasses
import time
from collections import deque

import numpy as np

RECENT_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot; counts are since the start, rates and times over the last 1000 steps."""

    waiting: int
    """Sequences that have not begun, or start over."""
    running: int
    """Sequences in the batch."""
    finished: int
    """Sequences that ended by themselves."""
    cancelled: int
    """Sequences that were aborted."""
    failed: int
    """Ended with "error"."""
    steps: int
    """Steps whose results are in."""
    prompt_tokens: int
    """Prompt tokens of the sequences that have begun their output."""
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""
    output_tokens: int
    """Tokens sampled."""
    preemptions: int
    """How often a sequence gave its pages back and started over."""
    drafted_tokens: int
    """Tokens that were guessed."""
    accepted_tokens: int
    """Guesses that turned out right."""
    pages: int
    """KV pages of 128 tokens in the cache."""
    pages_in_use: int
    """Of these, pages that a sequence holds; the others are free or keep a prefix until they are needed."""
    compiled_programs: int
    """Programs compiled so far."""
    compiled_after_start: int
    """Programs that a request had to wait for."""
    tokens_per_second: float
    """Output tokens a second."""
    step_ms_p50: float
    """Milliseconds of a step: the median,"""
    step_ms_p95: float
    """the 95th percentile,"""
    step_ms_p99: float
    """and the 99th."""

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompt tokens that came from the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Counters:
    """The engine's tallies."""

    def __init__(self):
        self.finished = self.cancelled = self.failed = self.steps = 0
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self._ends: deque[tuple[float, float, int, int]] = deque(maxlen=RECENT_STEPS)
        """Of steps taken at once: when they ended, how long after those before or their own start, output tokens, how
        many steps they were."""

    def step_done(self, started: float, tokens: int, steps: int) -> None:
        """The results of so many steps are in, which were handed to the device at `started`."""
        now = time.perf_counter()
        begun = max(started, self._ends[-1][0]) if self._ends else started
        self._ends.append((now, now - begun, tokens, steps))
        self.steps += steps
        self.output_tokens += tokens

    def rates(self) -> dict[str, float]:
        """Tokens a second and percentiles of the step time."""
        if not self._ends:
            return dict.fromkeys(("tokens_per_second", "step_ms_p50", "step_ms_p95", "step_ms_p99"), 0.0)
        _, durations, tokens, steps = np.array(self._ends).T
        p50, p95, p99 = np.percentile(durations / steps * 1e3, [50, 95, 99]).tolist()
        return {
            "tokens_per_second": float(tokens.sum() / durations.sum()),
            "step_ms_p50": p50,
            "step_ms_p95": p95,
            "step_ms_p99": p99,
        }
