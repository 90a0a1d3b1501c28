"""A replica: one engine in a process that Ray Serve started."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from ray import serve

from jora.errors import InputError
from jora.serve.adapters.describe import AdapterInfo
from jora.serve.async_engine import AsyncEngine, joined
from jora.serve.ray.wire import Change, EngineLost, Facts, GrammarSource, Refused
from jora.serve.requests import Event, Request, UnknownAdapter
from jora.serve.stats import EngineStats
from jora.serve.text.grammar import Grammars

LISTED = 256  # adapters, the last used, that a replica tells the router to send it more requests for

logger = logging.getLogger(__name__)


class Started(NamedTuple):
    """An engine that runs, and what belongs to it."""

    engine: AsyncEngine
    grammars: Grammars
    facts: Facts


class Status(NamedTuple):
    """A replica now. incarnation: of the process; rank: its number among those that run, which a successor takes."""

    incarnation: str
    rank: int
    stats: EngineStats


class Replica:
    """What Ray Serve deploys. start: loads the model and warms the engine up; called once, in the replica's process."""

    def __init__(self, start: Callable[[], Started]) -> None:
        self._engine, self._grammars, self._facts = start()
        self._applied: dict[str, int] = {}  # adapter -> number of the last change
        self._changing = asyncio.Lock()

    async def stream(
        self, request: Request, seconds: float | None, changes: Mapping[str, Change]
    ) -> AsyncGenerator[tuple[Event, ...] | Refused, None]:
        """A request's events: as they come, or whole answers at once for one that is not streamed.

        One `Refused` in place of the first where the engine does not take it. Raises EngineLost.

        Args:
            request: its deadline is not looked at: clocks differ between machines.
            seconds: to its deadline.
            changes: those of its adapter, which this replica may have missed.
        """
        try:
            with self._while_it_runs():
                await self._catch_up(changes)
                deadline = None if seconds is None else time.monotonic() + seconds
                request = replace(await self._with_grammar(request), deadline=deadline)
                async with aclosing(self._answers(request)) as answers:
                    async for events in answers:
                        yield events
        except InputError as error:
            yield Refused.of(error)

    async def _answers(self, request: Request) -> AsyncGenerator[tuple[Event, ...], None]:
        whole: dict[int, Event] = {}
        listed = False
        async with aclosing(self._engine.stream(request)) as events:
            async for event in events:
                self._check_engine()
                if not listed and request.adapter is not None:
                    await self._list(request.adapter)  # not before: clients may ask for any name
                    listed = True
                if request.streamed:
                    yield (event,)
                else:
                    before = whole.get(event.index)
                    whole[event.index] = event if before is None else joined(before, event)
        if whole:
            yield tuple(whole.values())

    @contextmanager
    def _while_it_runs(self) -> Iterator[None]:
        """Raises EngineLost where the engine has stopped, or stops: it tells those that come meanwhile by a
        RuntimeError, which would be taken for a bug that another replica has too.
        """
        self._check_engine()
        try:
            yield
        except RuntimeError:
            self._check_engine()
            raise

    def _check_engine(self) -> None:
        if self._engine.failure is not None:
            raise EngineLost("the engine has stopped") from self._engine.failure

    @serve.multiplexed(max_num_models_per_replica=LISTED)
    async def _list(self, adapter: str) -> str:
        """Ray Serve keeps the last of these names and tells routers; the engine itself loads and evicts."""
        return adapter

    async def _with_grammar(self, request: Request) -> Request:
        source = request.sampling.grammar
        if source is None:
            return request
        assert isinstance(source, GrammarSource)
        grammar = await asyncio.to_thread(self._grammars.compile, *source)
        return replace(request, sampling=replace(request.sampling, grammar=grammar))

    async def _catch_up(self, changes: Mapping[str, Change]) -> None:
        if all(self._applied.get(name, 0) >= change.number for name, change in changes.items()):
            return
        async with self._changing:
            for name, change in changes.items():
                if self._applied.get(name, 0) < change.number:
                    try:
                        await self._apply(name, change)
                    except UnknownAdapter:  # what is to be unloaded never was here
                        self._applied[name] = change.number

    async def _apply(self, name: str, change: Change) -> AdapterInfo | None:
        info = None
        if change.path is None:
            await self._engine.unload_adapter(name)
        else:
            info = await self._engine.load_adapter(name, change.path)
        self._applied[name] = change.number
        return info

    async def change(self, name: str, change: Change) -> AdapterInfo | Refused | None:
        """Load (what it is then) or unload an adapter. Raises EngineLost."""
        try:
            with self._while_it_runs():
                async with self._changing:
                    return await self._apply(name, change)
        except InputError as error:
            return Refused.of(error)

    async def adapters(self, changes: Mapping[str, Change]) -> list[AdapterInfo]:
        """All that are served. Raises EngineLost."""
        with self._while_it_runs():
            for name, change in changes.items():
                try:
                    await self._catch_up({name: change})
                except InputError as error:
                    logger.warning("a replica cannot serve what others do: %s", error)
            return await self._engine.adapters()

    async def facts(self) -> Facts:
        """What it serves, and in how much memory."""
        return self._facts

    async def status(self) -> Status:
        """For the metrics."""
        context = serve.get_replica_context()
        assert context.rank is not None
        return Status(context.replica_id.unique_id, context.rank.rank, await self._engine.stats())

    async def check_health(self) -> None:
        """Called by Ray Serve, which puts another process in place of one that raises or does not answer."""
        self._check_engine()
        await self._engine.stats()  # its thread gets to the next step
