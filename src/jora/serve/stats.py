"""What an engine tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing; what is counted is counted since its start.

    pool_pages: by owner. adapters: how many are "known", in "host" memory, "resident" in the pool. adapter_hits and
    adapter_misses: requests whose adapter was in host memory or the pool, and those that waited for it. adapter_loads,
    adapter_failures, adapter_load_seconds: loads from disk to host memory, those that failed, the time of all.
    cached_tokens: prompt tokens that the prefix cache had. service: weighted tokens that each client was given.
    """

    waiting: int
    running: int
    pool_pages: Mapping[str, int]
    adapters: Mapping[str, int]
    adapter_hits: int
    adapter_misses: int
    adapter_loads: int
    adapter_failures: int
    adapter_load_seconds: float
    preemptions: int
    cached_tokens: int
    service: Mapping[str, float]
