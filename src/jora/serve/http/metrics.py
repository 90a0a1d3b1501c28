"""What Prometheus reads: counts and times of requests, and the engine's state at the moment it asks.

Labels are few: owners, states and outcomes are fixed lists, clients are the first 50 that were seen and "other", and
adapters are never labels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jora.errors import InputError
from jora.serve.http.errors import ApiError, ClientGone
from jora.serve.requests import Event, Rejected
from jora.serve.stats import EngineStats

CLIENTS = 50
OTHER = "other"

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_BAD = ("cancelled", "deadline", "error")  # ways to finish


class _Clients:
    """The label of a client: its name for the first `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self.names:
            if len(self.names) >= self.limit:
                return OTHER
            self.names.add(name)
        return name


class _EngineCollector(Collector):
    """Shows the engine's state as it was last given."""

    def __init__(self, clients: _Clients) -> None:
        self.state: EngineStats | None = None
        self.clients = clients

    def collect(self) -> Iterator[Metric]:
        state = self.state
        if state is None:
            return
        yield GaugeMetricFamily("jora_requests_waiting", "Requests in the queue.", state.waiting)
        yield GaugeMetricFamily("jora_requests_running", "Sequences that are computed now.", state.running)
        yield _family(GaugeMetricFamily, "jora_pool_pages", "Pages of the pool by owner.", "owner", state.pool_pages)
        yield _family(GaugeMetricFamily, "jora_adapters", "Adapters by where they are.", "state", state.adapters)
        hits, misses = state.adapter_hits, state.adapter_misses
        yield CounterMetricFamily("jora_adapter_cache_hits", "Requests whose adapter was in memory.", hits)
        yield CounterMetricFamily("jora_adapter_cache_misses", "Requests that waited for their adapter.", misses)
        loads, seconds = state.adapter_loads, state.adapter_load_seconds
        yield CounterMetricFamily("jora_adapter_loads", "Adapters loaded from disk to host memory.", loads)
        yield CounterMetricFamily("jora_adapter_load_seconds", "Time that loading took, with validation.", seconds)
        failures = state.adapter_failures
        yield CounterMetricFamily("jora_adapter_load_failures", "Adapters that could not be loaded.", failures)
        yield CounterMetricFamily(
            "jora_preemptions", "Sequences that were put back to be recomputed.", state.preemptions
        )
        service: dict[str, float] = {}
        for name, tokens in state.service.items():
            label = self.clients.label(name)
            service[label] = service.get(label, 0.0) + tokens
        name, text = "jora_client_service_tokens", "Weighted tokens that a client was given."
        yield _family(CounterMetricFamily, name, text, "client", service)


def _family(kind: Any, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = kind(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


class Metrics:
    """All metrics of a server, in a registry of their own."""

    def __init__(self, clients: int = CLIENTS) -> None:
        self.registry = CollectorRegistry()
        self.clients = _Clients(clients)
        self._engine = _EngineCollector(self.clients)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=self.registry)

        self.requests = counter("jora_requests", "Requests that ended, by how.", "outcome")
        self.client_requests = counter("jora_client_requests", "Requests that ended, by client.", "client")
        self.prompt_tokens = counter("jora_prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = counter("jora_prefix_cache_hit_tokens", "Tokens of prompts that the prefix cache held.")
        self.generated_tokens = counter("jora_generated_tokens", "Tokens of answers.")
        self.first_token = histogram("jora_time_to_first_token_seconds", "Request to first token.", _FIRST_TOKEN)
        self.per_token = histogram("jora_time_per_output_token_seconds", "Mean after the first token.", _PER_TOKEN)
        self.whole = histogram("jora_request_seconds", "Request to the end of its answers.", _WHOLE)

    @contextmanager
    def request(self, client: str) -> Iterator[Observed]:
        """Observe a request from its arrival to its end: pass every event to what this yields."""
        observed = Observed(self)
        try:
            yield observed
        except BaseException as error:
            # An answer that ended badly is passed on as an error; how it ended says more.
            self._ended(client, observed.outcome if observed.outcome in _BAD else _outcome(error), observed)
            raise
        self._ended(client, observed.outcome, observed)

    def _ended(self, client: str, outcome: str | None, observed: Observed) -> None:
        self.requests.labels(outcome or "cancelled").inc()
        self.client_requests.labels(self.clients.label(client)).inc()
        self.prompt_tokens.inc(observed.prompt)
        self.cached_tokens.inc(observed.cached)
        if observed.outcome is not None:  # else its time says when the client left
            self.whole.observe(time.monotonic() - observed.began)
            for seconds in observed.paces():
                self.per_token.observe(seconds)

    def render(self, accept: str | None, state: EngineStats) -> tuple[bytes, str]:
        """The metrics in the format that an `Accept` header asks for (Prometheus or OpenMetrics), and its name.

        state: the engine's, now. Called on the event loop's thread alone.
        """
        self._engine.state = state
        encode, content_type = choose_encoder(accept or "")
        return encode(self.registry), content_type


def _outcome(error: BaseException) -> str:
    """How a request ended that this was raised in."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit | ClientGone):
        return "cancelled"
    if isinstance(error, Rejected):
        return "rejected"
    refused = isinstance(error, InputError) or (isinstance(error, ApiError) and error.status < 500)
    return "refused" if refused else "error"


class Observed:
    """A request under observation."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.began = time.monotonic()
        self.prompt = self.cached = 0
        self.outcome: str | None = None  # of the answer that ended last
        self._answers: dict[int, tuple[float, float, int]] = {}  # answer -> first token, last token, tokens

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        now = time.monotonic()
        self.prompt, self.cached = max(self.prompt, event.usage.prompt), max(self.cached, event.usage.cached)
        if event.tokens:
            if not self._answers:
                self.metrics.first_token.observe(now - self.began)
            first, _, count = self._answers.get(event.index, (now, now, 0))
            self._answers[event.index] = first, now, count + len(event.tokens)
            self.metrics.generated_tokens.inc(len(event.tokens))
        if event.finish is not None:
            self.outcome = event.finish

    def paces(self) -> list[float]:
        """Seconds a token after the first, of every answer whose tokens did not come all at once."""
        return [(last - first) / (count - 1) for first, last, count in self._answers.values() if last > first]
