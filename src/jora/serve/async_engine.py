"""The engine behind asyncio: its steps run in a thread of their own, every request is an async iterator of events.

What touches the engine runs in that thread, one thing after the other; callers hand it over and await the result. A
reader that falls behind costs memory for its own events alone (a request has at most `max_tokens` of them): it holds
up nobody, and the events that wait for it are joined into one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from jora.serve.adapters.describe import AdapterInfo
from jora.serve.engine import Engine
from jora.serve.requests import Event, Request
from jora.serve.stats import EngineStats

Result = TypeVar("Result")


class _Reader:
    """The events of one request, from the engine's thread to the caller's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int):
        self.loop, self.open = loop, answers
        self.running = set(range(answers))  # answers that have not ended, as the engine's thread knows it
        self._events: dict[int, Event] = {}  # what waits, by answer
        self._there = asyncio.Event()

    def put(self, event: Event) -> None:
        """Called in the loop."""
        waiting = self._events.get(event.index)
        self._events[event.index] = event if waiting is None else joined(waiting, event)
        self._there.set()

    async def get(self) -> list[Event]:
        await self._there.wait()
        self._there.clear()
        events, self._events = self._events, {}
        return list(events.values())


def joined(first: Event, second: Event) -> Event:
    """Two successive events of one answer as one."""
    return dataclasses.replace(
        second,
        tokens=first.tokens + second.tokens,
        text=first.text + second.text,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )


class AsyncEngine:
    """An `Engine` for a server. Start it once, in the loop that serves."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: dict[str, _Reader] = {}
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def failure(self) -> BaseException | None:
        """What stopped the engine for good; None while it runs."""
        return self._failure

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; closing the generator early cancels it.

        Raises InputError, Rejected or UnknownAdapter where the engine does not take it.
        """
        reader = _Reader(asyncio.get_running_loop(), request.sampling.n)

        def submit() -> None:
            self.engine.submit(request)
            self._readers[request.id] = reader

        try:
            await self._call(submit)
            while reader.open:
                for event in await reader.get():
                    reader.open -= event.finish is not None
                    yield event
        finally:
            # Behind `submit` in the queue, so it also finds a request whose caller left before it was taken.
            if reader.open:
                self._todo.put(lambda: self._forget(request.id, reader))

    def _forget(self, request: str, reader: _Reader) -> None:
        if self._readers.get(request) is reader:
            del self._readers[request]
            self.engine.cancel(request)

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load or replace an adapter. Raises InputError where it cannot be served."""
        info = await asyncio.to_thread(self.engine.load_adapter, name, path)
        await self._call(self.engine.retire)  # an idle engine makes no step that would free what was replaced
        return info

    async def unload_adapter(self, name: str) -> None:
        """Serve it no longer; requests that run with it finish. Raises UnknownAdapter."""
        await self._call(lambda: self.engine.unload_adapter(name))

    async def adapters(self) -> list[AdapterInfo]:
        """All adapters that are served. Beside the engine's thread: it looks through the whole directory."""
        return await asyncio.to_thread(self.engine.adapters)

    async def stats(self) -> EngineStats:
        """What the engine is doing. Adapters are counted beside the engine's thread, as above."""
        known = await asyncio.to_thread(lambda: len(self.engine.catalogue.names()))
        return await self._call(lambda: self.engine.stats(known))

    async def drain(self, seconds: float | None = None) -> bool:
        """Wait until nothing runs, at most so long; whether that came true."""

        async def idle() -> None:
            while await self._call(lambda: self.engine.has_work):
                await asyncio.sleep(0.05)

        try:
            await asyncio.wait_for(idle(), seconds)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """End the thread; what runs is given up."""
        self._stopping = True
        self._todo.put(lambda: None)
        self._thread.join()

    async def _call(self, function: Callable[[], Result]) -> Result:
        """Run a function between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def run() -> None:
            try:
                if self._failure is not None:
                    raise self._stopped()
                result = function()
            except BaseException as error:  # not swallowed: the caller gets it
                loop.call_soon_threadsafe(_set_exception, future, error)
            else:
                loop.call_soon_threadsafe(_set_result, future, result)

        self._todo.put(run)
        if self._failure is not None:  # looked at behind `put`: either the thread still finds it, or this does
            future.cancel()
            raise self._stopped()
        return await future

    def _stopped(self) -> RuntimeError:
        error = RuntimeError("the engine has stopped after an error")
        error.__cause__ = self._failure
        return error

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._do_waiting(block=not self.engine.has_work)
                if self.engine.has_work:
                    self._send(self.engine.step())
        except BaseException as error:
            self._failure = error
            self._end_streams(f"the engine failed: {error}")
            while not self._todo.empty():  # whoever waits for one of these is told
                self._todo.get()()
            raise

    def _end_streams(self, error: str) -> None:
        for name, reader in self._readers.items():
            for index in reader.running:
                event = Event(name, index, finish="error", error=error)
                reader.loop.call_soon_threadsafe(reader.put, event)
        self._readers.clear()

    def _do_waiting(self, block: bool) -> None:
        """Run what callers handed over; `block` waits for the first of it."""
        while True:
            try:
                todo = self._todo.get(block)
            except queue.Empty:
                return
            todo()
            block = False

    def _send(self, events: list[Event]) -> None:
        for event in events:
            reader = self._readers.get(event.request)
            if reader is None or reader.loop.is_closed():  # the server ends before what it gave up
                continue
            reader.loop.call_soon_threadsafe(reader.put, event)
            if event.finish is not None:
                reader.running.remove(event.index)
                if not reader.running:
                    del self._readers[event.request]


def _set_result(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():  # the caller may have gone
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
