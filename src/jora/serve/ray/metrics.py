"""What `/metrics` shows of each replica, beside the sums that it shows of one engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jora.serve.ray.replica import Status


class ReplicaCollector(Collector):
    """Gauges by the replicas' ranks, of which there are never more than replicas."""

    def __init__(self, statuses: Callable[[], Sequence[Status]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[Metric]:
        """Called at every scrape, behind `Backend.stats`."""
        waiting = _family("requests_waiting", "Requests in a replica's queue.")
        running = _family("requests_running", "Sequences that a replica computes now.")
        pages = _family("pool_pages", "Pages of a replica's pool by owner.", "owner")
        adapters = _family("adapters", "A replica's adapters by where they are.", "state")
        for status in self._statuses():
            rank, stats = str(status.rank), status.stats
            waiting.add_metric([rank], stats.waiting)
            running.add_metric([rank], stats.running)
            for owner, number in stats.pool_pages.items():
                pages.add_metric([rank, owner], number)
            for state, number in stats.adapters.items():
                adapters.add_metric([rank, state], number)
        yield from (waiting, running, pages, adapters)


def _family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"jora_replica_{name}", text, labels=["replica", *labels])
