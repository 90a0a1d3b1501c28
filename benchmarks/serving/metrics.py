"""What a served trace is judged by: latencies, throughput, goodput, and how evenly clients were served.

    TTFT      first token - arrival in the trace (waiting before the engine took it included)
    TPOT      (last token - first token) / (tokens - 1), of requests with at least two tokens
    ITL       every single gap between two tokens of a request
    e2e       last token - arrival
    goodput   requests whose TTFT and TPOT are both within the SLO: their share, and how many a second

Throughput counts from the first arrival to the last token. Service is VTC's (arXiv 2401.00588): 1 for an input token,
charged with the first output token, and 2 for an output token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .trace import Arrival

PERCENTILES = (50, 90, 99)
INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


class Served(NamedTuple):
    """One request and when its tokens came: `times` has one entry a token, in seconds from the trace's start.

    finished: all of its tokens came; a run that is cut off leaves some that are not.
    """

    number: int
    arrival: float
    inputs: int
    times: tuple[float, ...]
    client: str = "default"
    tokens: tuple[int, ...] = ()
    finished: bool = True

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds a token after the first; 0 where there is one token alone."""
        return (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)

    @property
    def latency(self) -> float:
        return self.times[-1] - self.arrival


class Slo(NamedTuple):
    """Seconds to the first token and a token after that."""

    ttft: float
    tpot: float


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """{"p50": ..., "p90": ..., "p99": ...}, interpolated; empty of nothing."""
    found = np.fromiter(values, float)
    return {f"p{q}": float(np.percentile(found, q)) for q in PERCENTILES} if found.size else {}


def summary(served: Sequence[Served], slo: Slo) -> dict[str, Any]:
    """Every figure of one run of a trace."""
    if not served:
        return {"requests": 0}
    seconds = max(one.times[-1] for one in served) - min(one.arrival for one in served)
    outputs = sum(len(one.times) for one in served)
    good = sum(one.ttft <= slo.ttft and one.tpot <= slo.tpot for one in served)
    return {
        "requests": len(served),
        "seconds": seconds,
        "requests_per_s": len(served) / seconds,
        "output_tokens_per_s": outputs / seconds,
        "tokens_per_s": (outputs + sum(one.inputs for one in served)) / seconds,
        "goodput": good / len(served),
        "good_requests_per_s": good / seconds,
        "ttft": percentiles(one.ttft for one in served),
        "tpot": percentiles(one.tpot for one in served if len(one.times) > 1),
        "itl": percentiles(gap for one in served for gap in np.diff(one.times)),
        "e2e": percentiles(one.latency for one in served),
    }


def service(served: Iterable[Served], client: str, ticks: np.ndarray) -> np.ndarray:
    """Service that a client has had by each of the ticks (seconds)."""
    total = np.zeros(len(ticks))
    for one in served:
        if one.client == client:
            total += OUTPUT_WEIGHT * np.searchsorted(one.times, ticks, side="right")
            total += INPUT_WEIGHT * one.inputs * (ticks >= one.times[0])
    return total


def demand(asked: Iterable[Arrival], client: str, ticks: np.ndarray) -> np.ndarray:
    """Service that a client has asked for by each of the ticks."""
    total = np.zeros(len(ticks))
    for one in asked:
        if one.client == client:
            total += (ticks >= one.time) * (INPUT_WEIGHT * len(one.prompt) + OUTPUT_WEIGHT * one.output)
    return total


def fairness(
    asked: Sequence[Arrival], served: Sequence[Served], until: float, window: float, ticks: int = 100
) -> dict[str, Any]:
    """How far apart clients were served in [0, until].

    gap: the largest client's accumulated service less the smallest's, at each tick. difference: within a window, in
    service a second, every client's distance from the client that was served most, summed; no client is missing more
    than it had asked for and not been given at the window's end.
    """
    names = sorted({one.client for one in asked})
    at = np.linspace(0.0, until, ticks + 1)[1:]
    had = np.stack([service(served, name, at) for name in names])
    high = np.linspace(window, until, ticks)
    rates, missing = [], []
    for name in names:
        before, after = service(served, name, high - window), service(served, name, high)
        rates.append((after - before) / window)
        missing.append((demand(asked, name, high) - after) / window)
    rate = np.stack(rates)
    difference = np.minimum(rate.max(axis=0) - rate, np.maximum(np.stack(missing), 0)).sum(axis=0)
    gap = had.max(axis=0) - had.min(axis=0)
    return {
        "seconds": at.tolist(),
        "service": {name: row.tolist() for name, row in zip(names, had, strict=True)},
        "gap_max": float(gap.max()),
        "gap_end": float(gap[-1]),
        "difference_max": float(difference.max()),
        "difference_mean": float(difference.mean()),
    }
