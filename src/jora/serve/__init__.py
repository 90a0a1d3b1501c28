"""Floor 6: serving one base with thousands of adapters. docs/serving.md says how memory is laid out and why.

The names below are imported on first use, so that the HTTP side and the command's help do not wait for the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jora.serve.async_engine import AsyncEngine
    from jora.serve.engine import Engine
    from jora.serve.options import EngineOptions
    from jora.serve.requests import Event, Rejected, Request, SamplingOptions, UnknownAdapter
    from jora.serve.stats import EngineStats

_HOMES = {
    "AsyncEngine": "async_engine",
    "Engine": "engine",
    "EngineOptions": "options",
    "EngineStats": "stats",
    "Event": "requests",
    "Rejected": "requests",
    "Request": "requests",
    "SamplingOptions": "requests",
    "UnknownAdapter": "requests",
}

__all__ = [
    "AsyncEngine",
    "Engine",
    "EngineOptions",
    "EngineStats",
    "Event",
    "Rejected",
    "Request",
    "SamplingOptions",
    "UnknownAdapter",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'jora.serve' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jora.serve.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
