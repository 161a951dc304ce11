"""What Prometheus sees."""

import os
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from jaxdet.server.messages import Told

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus_client's name for where it adds up what several processes count; it looks when it is imported."""

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """HTTP's counts and times, of all its processes; the engine's are read when they are asked for."""

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

    def render(self, told: Told) -> bytes:
        """Everything in Prometheus' text format."""
        http, engine = self._registry, CollectorRegistry()
        if folder := os.environ.get(FOLDER):
            MultiProcessCollector(http := CollectorRegistry(), folder)
        engine.register(_Engine(told))
        return generate_latest(http) + generate_latest(engine)


class _Engine:
    """One snapshot of the engine, as a collector."""

    def __init__(self, told: Told):
        self._told = told

    def collect(self) -> Iterator[Metric]:
        s = self._told.stats
        gauges = {
            "sequences_open": (
                self._told.taken,
                "Sequences that run or wait, or whose grammar is being read",
            ),
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
