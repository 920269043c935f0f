"""What the door counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mycel.door.journal import Journal
from mycel.generation.request import Spans
from mycel.generation.service import Service

FINE = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one door; each has a registry of its own, so that several doors live in one process.

    Parameters
    ----------
    backend : object
        What generates; a ``Service`` also shows its pages and its queue.
    journal : Journal, optional
        Told of every choice.
    """

    def __init__(self, backend: object, journal: Journal | None = None) -> None:
        self.journal = journal
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "mycel_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self._tokens = Counter("mycel_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._cancelled = Counter("mycel_cancelled", "Requests whose client went away", registry=registry)
        self._first = Histogram(
            "mycel_first_token_seconds", "From arrival to the first token", buckets=SECONDS, registry=registry
        )
        self._each = Histogram(
            "mycel_token_seconds", "Between tokens, mean of a request", buckets=SECONDS, registry=registry
        )
        self._whole = Histogram(
            "mycel_request_seconds", "From arrival to the last token", buckets=SECONDS, registry=registry
        )
        self._spans = Histogram(
            "mycel_span_seconds",
            "Parts of a request's way from the door to the engine and back",
            ["span"],
            buckets=FINE,
            registry=registry,
        )
        if isinstance(backend, Service):
            self._watch(backend)

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self._requests.labels(route, str(status)).inc()
        if status >= 400 and self.journal is not None:
            self.journal.refused(status)

    def left(self) -> None:
        """Count a client that went away."""
        self._cancelled.inc()

    def finished(self, prompt: int, spans: Spans, whole: bool) -> None:
        """Take note of one choice: where its time went, tokens of its prompt, whether it was all read."""
        arrived = spans.arrived
        if self.journal is not None:
            self.journal.note(prompt, spans, whole)
        for name, seconds in spans.shares().items():
            self._spans.labels(name).observe(seconds)
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("generated").inc(spans.tokens)
        if spans.first:
            self._first.observe(spans.first - arrived)
            self._whole.observe(spans.last - arrived)
        if spans.tokens > 1:
            self._each.observe((spans.last - spans.first) / (spans.tokens - 1))

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _watch(self, service: Service) -> None:
        engine = service.engine
        watched = {
            "mycel_unfinished_requests": ("Requests under way", lambda: service.unfinished),
            "mycel_pages_held": ("Pages of the key-value store in use", lambda: engine.pool.held),
            "mycel_pages": ("Pages of the key-value store", lambda: engine.pool.count),
            "mycel_iterations": ("Iterations of the engine", lambda: engine.counts.steps),
            "mycel_set_aside": ("Requests set aside for others", lambda: engine.counts.set_aside),
            "mycel_shared_tokens": ("Prompt tokens found in the store", lambda: engine.counts.shared),
        }
        for name, (about, read) in watched.items():
            Gauge(name, about, registry=self.registry).set_function(read)
