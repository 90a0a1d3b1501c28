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

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from jora.serve.adapters.describe import AdapterInfo
from jora.serve.async_engine import joined
from jora.serve.engine import EngineStats
from jora.serve.http.errors import ApiError
from jora.serve.ray.replica import Status
from jora.serve.ray.wire import Change, Refused
from jora.serve.requests import Event, Request

ATTEMPTS = 4  # replicas that one request may take down with it, should it be at fault
PAUSE = 0.25  # seconds before the second attempt; doubles, so that a dead replica is known as such
STATUS_SECONDS = 5.0  # for all replicas to say how they are
LATE = 1.0  # seconds beyond a request's deadline for its replica to say so
GAUGES = ("waiting", "running", "pool_pages", "adapters")  # what an engine has now; its other numbers are counts
LOST = (RayError, RayServeException)  # the process, its machine or its engine has gone

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
        try:
            async with aclosing(self._retried(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.open -= 1

    async def _retried(self, request: Request) -> AsyncGenerator[Event, None]:
        passed_on = False
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
            whole: dict[int, Event] = {}
            try:
                async with aclosing(self._attempt(request)) as events:
                    async for event in events:
                        if not request.streamed:
                            before = whole.get(event.index)
                            whole[event.index] = event if before is None else joined(before, event)
                            continue
                        passed_on = True
                        yield event
            except LOST as error:
                logger.warning("request %s lost its replica: %s", request.id, str(error).strip().splitlines()[-1:])
                if passed_on:
                    break
            else:
                for event in whole.values():
                    yield event
                return
        raise ApiError(503, "the replica that answered was lost; ask again", code="replica_lost")

    async def _attempt(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events from one replica. Raises what it refuses with, and any of LOST."""
        seconds = None if request.deadline is None else request.deadline - time.monotonic()
        name = request.adapter or ""
        changes = {name: self._changes[name]} if name in self._changes else {}
        handle = self._handle.options(stream=True, multiplexed_model_id=name)
        items = handle.stream.remote(replace(request, deadline=None), seconds, changes)
        ended = False
        try:
            # Of the waits, the first one alone may be long without an engine that looks at the clock.
            item = await asyncio.wait_for(anext(items, None), None if seconds is None else max(0.0, seconds) + LATE)
            while item is not None:
                if isinstance(item, Refused):
                    raise item.error()
                yield item
                item = await anext(items, None)
            ended = True
        except TimeoutError:
            for index in range(request.sampling.n):
                yield Event(request.id, index, finish="deadline")
        finally:
            if not ended:
                items.cancel()

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load it in all replicas, or in none. Raises InputError where one of them cannot."""
        async with self._changing:
            change = Change(next(self._numbers), path)
            found = await self._everywhere("change", name, change)
            refused = [each for each in found if isinstance(each, Refused)]
            if refused:
                if len(refused) < len(found):
                    before = self._changes.get(name)
                    back = Change(next(self._numbers), None if before is None else before.path)
                    await self._everywhere("change", name, back)
                raise refused[0].error()
            self._changes[name] = change
            return found[0]

    async def unload_adapter(self, name: str) -> None:
        """Serve it nowhere any more. Raises UnknownAdapter where no replica has it."""
        async with self._changing:
            change = Change(next(self._numbers), None)
            found = await self._everywhere("change", name, change)
            refused = [each for each in found if isinstance(each, Refused)]
            if len(refused) == len(found):
                raise refused[0].error()
            self._changes[name] = change

    async def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        """What each replica returns; those that go meanwhile are left out: their successors catch up."""
        found = await self._handle.broadcast(method, *arguments).results_async(return_exceptions=True)
        there = [each for each in found if not isinstance(each, BaseException)]
        if not there:
            raise found[0]
        return there

    async def adapters(self) -> list[AdapterInfo]:
        """As one of the replicas has them; all look into the same directory."""
        return await self._handle.adapters.remote(self._changes)

    async def stats(self) -> EngineStats:
        """Those that answer, as if they were one engine. What is counted goes on when a replica is replaced."""
        try:
            answers = self._handle.broadcast("status").results_async(timeout_s=STATUS_SECONDS, return_exceptions=True)
            self.statuses = [each for each in await answers if isinstance(each, Status)]
        except (*LOST, TimeoutError):
            self.statuses = []  # they are all being replaced
        self._counted.update({each.incarnation: each.stats for each in self.statuses})
        running, ever = [each.stats for each in self.statuses], list(self._counted.values())
        return EngineStats(**{f.name: _sum(f, running if f.name in GAUGES else ever) for f in fields(EngineStats)})

    async def drain(self, seconds: float) -> bool:
        """Wait until nothing runs, at most so long; whether that came true."""
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return not self.open


def _sum(field: Field[Any], states: Sequence[EngineStats]) -> Any:
    """A field of all states together: numbers, or numbers by name."""
    values = [getattr(state, field.name) for state in states]
    if "Mapping" not in field.type:
        return sum(values)
    names = sorted({name for value in values for name in value})
    return {name: sum(value.get(name, 0) for value in values) for name in names}
