"""S-LoRA's synthetic workload (arXiv 2311.03285, section 7.1), and the two clients of VTC (arXiv 2401.00588, 5.2).

Arrivals are a Gamma process: intervals of mean 1 / rate and coefficient of variation cv (shape 1 / cv^2, scale
cv^2 / rate; cv 1 is Poisson). The adapter of a request is floor(n X) where X in [0, 1) has the density
alpha x^(alpha - 1), so that adapter i is asked for with probability ((i + 1) / n)^alpha - (i / n)^alpha. In these
terms alpha = 1, the default of the paper's experiments, is *uniform*; alpha below 1 favours the first adapters (0.1
gives the first of 100 adapters 63 % of the requests). Lengths are uniform over [low, high], both ends included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FIRST_TOKEN = 3  # the ids below are usually padding, start and end


class Arrival(NamedTuple):
    """One request of a trace. time: seconds from the start; adapter: its number, None for the base."""

    number: int
    time: float
    prompt: tuple[int, ...]
    output: int
    adapter: int | None = None
    client: str = "default"


class Workload(NamedTuple):
    """What a synthetic trace is drawn from. rate: requests a second; lengths in tokens."""

    requests: int
    rate: float
    cv: float = 1.0
    alpha: float = 1.0
    inputs: tuple[int, int] = (8, 512)
    outputs: tuple[int, int] = (8, 512)
    seed: int = 0


def popularity(adapters: int, alpha: float) -> np.ndarray:
    """The probability of each adapter, [adapters]."""
    edges = (np.arange(adapters + 1) / adapters) ** alpha
    return np.diff(edges)


def synthetic(load: Workload, adapters: int, vocabulary: int) -> list[Arrival]:
    """A trace over so many adapters (0: every request is for the base), in the order of arrival.

    Times, lengths and prompts depend on `load` alone: traces over 16 and over 2000 adapters differ in nothing else.
    """
    times, chosen, inputs, outputs, prompts = (np.random.default_rng((load.seed, part)) for part in range(5))
    at = np.cumsum(times.gamma(1 / load.cv**2, load.cv**2 / load.rate, load.requests))
    # The inverse of the distribution function; a uniform draw that rounds up to 1 would name adapter n.
    which = np.minimum(chosen.random(load.requests) ** (1 / load.alpha) * adapters, adapters - 1).astype(int)
    lengths = inputs.integers(*load.inputs, load.requests, endpoint=True)
    answers = outputs.integers(*load.outputs, load.requests, endpoint=True)
    return [
        Arrival(
            number,
            float(at[number]),
            _tokens(prompts, int(lengths[number]), vocabulary),
            int(answers[number]),
            int(which[number]) if adapters else None,
        )
        for number in range(load.requests)
    ]


def clients(
    rates: Sequence[float], seconds: float, inputs: int, outputs: int, vocabulary: int, seed: int = 0
) -> list[Arrival]:
    """Clients "0", "1", ... that each send requests of one size at an even rate (requests a second)."""
    prompts = np.random.default_rng(seed)
    # The first request of each after one interval, as VTC's traces are made; ties go to the smaller number.
    times = [((k + 1) / rate, c) for c, rate in enumerate(rates) for k in range(int(seconds * rate))]
    return [
        Arrival(number, time, _tokens(prompts, inputs, vocabulary), outputs, client=str(client))
        for number, (time, client) in enumerate(sorted(times))
    ]


def _tokens(random: np.random.Generator, length: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(random.integers(FIRST_TOKEN, vocabulary, length).tolist())
