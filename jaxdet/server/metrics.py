"""What Prometheus sees."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from jaxdet.engine.stats import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The server's own counts and times; the engine's are read when they are asked for."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "jaxdet_http_requests", "Requests by path and status", ["path", "status"], registry=registry
        )
        self.first_token = Histogram(
            "jaxdet_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "jaxdet_inter_token_seconds",
            "Between a request's steps that gave tokens",
            buckets=SHORT_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "jaxdet_request_seconds",
            "From the request to its last token",
            buckets=SECONDS,
            registry=registry,
        )

    def render(self, stats: EngineStats, open_sequences: int) -> bytes:
        """Everything in Prometheus' text format."""
        engine = CollectorRegistry()
        engine.register(_Engine(stats, open_sequences))
        return generate_latest(self._registry) + generate_latest(engine)


class _Engine:
    """One snapshot of the engine, as a collector."""

    def __init__(self, stats: EngineStats, open_sequences: int):
        self._stats, self._open = stats, open_sequences

    def collect(self) -> Iterator[Metric]:
        s = self._stats
        gauges = {
            "sequences_open": (self._open, "Sequences of requests that were accepted and aren't answered"),
            "sequences_waiting": (s.waiting, "Sequences that wait for their turn"),
            "sequences_running": (s.running, "Sequences in the batch"),
            "kv_pages": (s.pages, "Pages of the KV cache"),
            "kv_pages_in_use": (s.pages_in_use, "Pages that running sequences hold"),
            "tokens_per_second": (s.tokens_per_second, "Output tokens a second over the last steps"),
            "cache_hit_ratio": (s.cache_hit_rate, "Share of prompt tokens that came from the prefix cache"),
        }
        counters = {
            "sequences_finished": (s.finished, "Sequences that ended by themselves"),
            "sequences_cancelled": (s.cancelled, "Sequences ended by their client"),
            "sequences_failed": (s.failed, "Sequences that ended with an error"),
            "steps": (s.steps, "Steps of the engine"),
            "prompt_tokens": (s.prompt_tokens, "Prompt tokens"),
            "cached_tokens": (s.cached_tokens, "Prompt tokens that came from the prefix cache"),
            "output_tokens": (s.output_tokens, "Sampled tokens"),
            "preemptions": (s.preemptions, "Sequences that gave up their pages and started over"),
            "drafted_tokens": (s.drafted_tokens, "Tokens that were guessed"),
            "accepted_tokens": (s.accepted_tokens, "Guesses that were right"),
            "compiled_programs_after_start": (
                s.compiled_after_start,
                "Programs that a request had to wait for",
            ),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"jaxdet_{name}", text, value=value)
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"jaxdet_{name}", text, value=value)
