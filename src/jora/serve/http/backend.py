"""What the HTTP side asks of the engine. `jora.serve.async_engine.AsyncEngine` is one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from jora.serve.requests import Event, Request
from jora.serve.stats import EngineStats


class AdapterInfo(Protocol):
    """An adapter that the engine serves. `rank`: the largest of its targets' ranks, None where it has none."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Any: ...
    @property
    def method(self) -> str: ...
    @property
    def rank(self) -> int | None: ...


class Backend(Protocol):
    """An engine behind asyncio; all is called on the event loop's thread."""

    def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """The request's events; closing this, or cancelling who waits for the next one, cancels the request.

        Ends after each of the request's n answers had an event with `finish`. Raises `UnknownAdapter`, `Rejected` or
        `InputError` in place of the first event. A reader that does not come back for a while finds what happened
        meanwhile joined into few events, so that it holds up nobody and costs no more than its own answer.
        """
        ...

    async def load_adapter(self, name: str, path: str) -> Any:
        """Validate an adapter and serve it, in place of one with this name if there is one. Raises `InputError`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Raises `UnknownAdapter`."""
        ...

    async def adapters(self) -> Sequence[AdapterInfo]: ...

    async def stats(self) -> EngineStats:
        """What the engine is doing, for the metrics."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine for good; None while it runs."""
        ...
