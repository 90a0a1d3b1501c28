"""Metrics: prometheus_client's own parsers read what a server shows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from jora.errors import InputError
from jora.serve.http.errors import ApiError
from jora.serve.http.metrics import Metrics
from jora.serve.requests import Event, Rejected, Usage


def state(**changes):
    values = {
        "waiting": 3,
        "running": 2,
        "pool_pages": {"free": 5, "kv": 3, "adapter": 2, "cache": 1},
        "adapters": {"resident": 1, "host": 4, "known": 9},
        "adapter_hits": 7,
        "adapter_misses": 6,
        "adapter_loads": 5,
        "adapter_failures": 1,
        "adapter_load_seconds": 0.25,
        "preemptions": 8,
        "service": {"acme": 12.5},
    }
    return SimpleNamespace(**(values | changes))


def shown(metrics: Metrics, **changes) -> dict[tuple, float]:
    text, _ = metrics.render(None, state(**changes))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in prometheus(text.decode())
        for sample in family.samples
    }


def test_the_engine_as_it_is():
    found = shown(Metrics())
    assert found["jora_requests_waiting",] == 3 and found["jora_requests_running",] == 2
    assert found["jora_pool_pages", "adapter"] == 2 and found["jora_pool_pages", "free"] == 5
    assert found["jora_adapters", "known"] == 9
    assert found["jora_adapter_cache_hits_total",] == 7 and found["jora_adapter_cache_misses_total",] == 6
    assert found["jora_adapter_loads_total",] == 5 and found["jora_adapter_load_failures_total",] == 1
    assert found["jora_adapter_load_seconds_total",] == 0.25
    assert found["jora_preemptions_total",] == 8
    assert found["jora_client_service_tokens_total", "acme"] == 12.5
    assert found["process_resident_memory_bytes",] > 0


def test_a_request_from_arrival_to_end(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("jora.serve.http.metrics.time.monotonic", lambda: now[0])
    metrics = Metrics()
    with metrics.request("acme") as observed:
        now[0] += 0.3
        observed(Event("r", tokens=(1,), usage=Usage(20, 16, 1)))
        now[0] += 0.4
        observed(Event("r", tokens=(2, 3), usage=Usage(20, 16, 3)))
        now[0] += 0.1
        observed(Event("r", finish="length", usage=Usage(20, 16, 3)))
    found = shown(metrics)
    assert found["jora_requests_total", "length"] == 1 and found["jora_client_requests_total", "acme"] == 1
    assert found["jora_prompt_tokens_total",] == 20 and found["jora_prefix_cache_hit_tokens_total",] == 16
    assert found["jora_generated_tokens_total",] == 3
    assert found["jora_time_to_first_token_seconds_sum",] == pytest.approx(0.3)
    assert found["jora_time_per_output_token_seconds_sum",] == pytest.approx(0.2)
    assert found["jora_request_seconds_sum",] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (asyncio.CancelledError(), "cancelled"),
        (Rejected("full", 1.0), "rejected"),
        (InputError("no"), "refused"),
        (ApiError(404, "no"), "refused"),
        (ApiError(503, "no"), "error"),
        (KeyError("a bug"), "error"),
    ],
)
def test_how_else_it_ends(error, outcome):
    metrics = Metrics()
    with pytest.raises(type(error)), metrics.request("acme"):
        raise error
    found = shown(metrics)
    assert found["jora_requests_total", outcome] == 1
    assert found["jora_request_seconds_count",] == 0


def test_clients_are_the_first_fifty_and_other():
    metrics = Metrics()
    for number in range(60):
        with metrics.request(f"client-{number}") as observed:
            observed(Event("r", finish="stop"))
    found = shown(metrics, service={f"client-{number}": 2.0 for number in range(60)})
    for name in ("jora_client_requests_total", "jora_client_service_tokens_total"):
        labels = [key[1] for key in found if key[0] == name]
        assert len(labels) == 51 and "client-49" in labels and "client-50" not in labels
    assert found["jora_client_requests_total", "other"] == 10
    assert found["jora_client_service_tokens_total", "other"] == 20.0


def test_the_format_is_what_was_asked_for():
    metrics = Metrics()
    text, kind = metrics.render("application/openmetrics-text; version=1.0.0", state())
    assert kind.startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics(text.decode())}
    assert families["jora_adapter_load_seconds"].type == "counter"
    assert families["jora_time_to_first_token_seconds"].type == "histogram"
    assert families["jora_requests"].type == "counter"
    _, kind = metrics.render("text/html, */*", state())
    assert kind.startswith("text/plain")


@pytest.mark.parametrize("finish", ["deadline", "cancelled", "error"])
def test_an_answer_that_ends_badly_is_counted_as_it_ended(finish: Any) -> None:
    metrics = Metrics()
    with pytest.raises(ApiError), metrics.request("acme") as observed:
        observed(Event("r", finish=finish))
        raise ApiError(400, "no")
    assert shown(metrics)["jora_requests_total", finish] == 1
