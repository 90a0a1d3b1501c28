"""The `Backend` of the HTTP app whose engines are replicas.

A request whose replica is lost goes to another one unless a part of its answer has been passed on. What was passed on
cannot be taken back, and the same tokens are not sure to come again, so such a stream ends with an error.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import Field, fields, replace
from itertools import count
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from jora.serve.adapters.describe import AdapterInfo
from jora.serve.http.errors import ApiError
from jora.serve.ray.replica import Status
from jora.serve.ray.wire import Change, EngineLost, Refused
from jora.serve.requests import Event, Request
from jora.serve.stats import EngineStats

ATTEMPTS = 4  # replicas that one request may take down with it, should it be at fault
PAUSE = 0.25  # seconds before the second attempt; doubles, so that a dead replica is known as such
STATUS_SECONDS = 5.0  # for all replicas to say how they are
LATE = 1.0  # seconds beyond a request's deadline for its replica to say so itself
GAUGES = ("waiting", "running", "pool_pages", "adapters")  # what an engine has now; its other numbers are counts
LOST = (RayError, RayServeException)  # the process, its machine or its engine has gone, unless `_is_bug`

logger = logging.getLogger(__name__)


class Replicas:
    """Replicas behind a handle of Ray Serve. All methods are called in one event loop, as `Backend` says."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._changes: dict[str, Change] = {}  # what all replicas are to have done
        self._numbers = count(1)
        self._changing = asyncio.Lock()
        self._counted: dict[str, EngineStats] = {}  # of every replica that was ever seen
        self.statuses: list[Status] = []  # of those that answered the last `stats`
        self.open = 0  # requests

    @property
    def failure(self) -> None:
        """Ray puts new replicas in place of those that fail; requests wait for them."""

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """See `Backend.stream`."""
        self.open += 1
        passed_on = False
        try:
            async for _ in _attempts():
                try:
                    async with aclosing(self._attempt(request)) as items:
                        async for events in items:
                            passed_on = True
                            for event in events:
                                yield event
                    return
                except LOST as error:
                    _noted(error, f"request {request.id}")
                    if passed_on:
                        break
        finally:
            self.open -= 1
        raise _lost()

    async def _attempt(self, request: Request) -> AsyncGenerator[tuple[Event, ...], None]:
        """The events from one replica. Raises what it refuses with, and any of LOST."""
        seconds = None if request.deadline is None else request.deadline - time.monotonic()
        name = request.adapter or ""
        changes = {name: self._changes[name]} if name in self._changes else {}
        handle = self._handle.options(stream=True, multiplexed_model_id=name)
        items = handle.stream.remote(replace(request, deadline=None), seconds, changes)
        ended = False
        try:
            # Where no replica is there, nobody else looks at the clock.
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds) + LATE):
                item = await anext(items, None)
            while item is not None:
                if isinstance(item, Refused):
                    raise item.error()
                yield item
                item = await anext(items, None)
            ended = True
        except TimeoutError:
            yield tuple(Event(request.id, index, finish="deadline") for index in range(request.sampling.n))
        finally:
            if not ended:
                items.cancel()

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load it in all replicas. Raises InputError where one of them cannot.

        If others could, the name is unloaded everywhere: all replicas serve the same.
        """
        async with self._changing:
            found = await self._change(name, path)
            refused = [each for each in found if isinstance(each, Refused)]
            if refused:
                if len(refused) < len(found):
                    await self._change(name, None)
                raise refused[0].error()
            return found[0]

    async def unload_adapter(self, name: str) -> None:
        """Serve it nowhere any more. Raises UnknownAdapter where no replica has it."""
        async with self._changing:
            found = await self._change(name, None)
            if all(isinstance(each, Refused) for each in found):
                raise found[0].error()

    async def _change(self, name: str, path: str | None) -> list[Any]:
        """What each replica returns. Those that go or come meanwhile are left out: they catch up with requests."""
        change = Change(next(self._numbers), path)
        try:
            told = self._handle.broadcast("change", name, change)
            found = await told.results_async(return_exceptions=True)
        except LOST as error:  # there is none
            raise _lost() from error
        there = [each for each in found if not isinstance(each, LOST) or _is_bug(each)]
        if not there:
            raise _lost()
        if not all(isinstance(each, Refused) for each in there):
            self._changes[name] = change
        for each in there:
            if isinstance(each, BaseException):
                raise each
        return there

    async def adapters(self) -> list[AdapterInfo]:
        """As one of the replicas has them; all look into the same directory."""
        async for _ in _attempts():
            try:
                return await self._handle.adapters.remote(self._changes)
            except LOST as error:
                _noted(error, "the list of adapters")
        raise _lost()

    async def stats(self) -> EngineStats:
        """Those that answer, as if they were one engine. What is counted goes on when a replica is replaced."""
        try:
            told = self._handle.broadcast("status")
            found = await told.results_async(timeout_s=STATUS_SECONDS, return_exceptions=True)
        except (*LOST, TimeoutError):  # they are all being replaced
            found = []
        self.statuses = [each for each in found if isinstance(each, Status)]
        self._counted.update({each.incarnation: each.stats for each in self.statuses})
        running, ever = [each.stats for each in self.statuses], list(self._counted.values())
        return EngineStats(**{f.name: _sum(f, running if f.name in GAUGES else ever) for f in fields(EngineStats)})

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing runs, at most so long; whether that came true."""
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.open


async def _attempts() -> AsyncGenerator[None, None]:
    """Turns, with a pause before each but the first."""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
        yield


def _is_bug(error: BaseException) -> bool:
    """Whether a replica lives and raised this; it would again."""
    return isinstance(error, RayTaskError) and not isinstance(error, EngineLost)


def _noted(error: BaseException, what: str) -> None:
    """Log what was lost with its replica. Raises a bug instead."""
    if _is_bug(error):
        raise error
    logger.warning("%s: its replica was lost (%s)", what, type(error).__name__)


def _lost() -> ApiError:
    return ApiError(503, "the replica was lost; ask again", code="replica_lost", headers={"Retry-After": "5"})


def _sum(field: Field[Any], states: Sequence[EngineStats]) -> Any:
    """A field of all states together: numbers, or numbers by name."""
    values = [getattr(state, field.name) for state in states]
    if "Mapping" not in field.type:
        return sum(values)
    names = sorted({name for value in values for name in value})
    return {name: sum(value.get(name, 0) for value in values) for name in names}
