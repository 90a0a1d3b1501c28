"""A replica whose engine stops, without a cluster: what it was asked goes to another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest

from jora.serve.async_engine import AsyncEngine
from jora.serve.requests import Event, Request, SamplingOptions

pytest.importorskip("ray", reason="jora serve --ray needs the extra `ray`")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* deprecated:pydantic.PydanticDeprecatedSince20"),  # by ray.serve
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),  # the engine's end
]

SECONDS = 60


class Engine:
    """Answers with one token. Where it is to fail, a step waits for `fail` and then does."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.in_step, self.fail = fails, threading.Event(), threading.Event()
        self.waiting: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def cancel(self, request: str) -> None:
        pass

    def unload_adapter(self, name: str) -> None:
        pass

    def step(self) -> list[Event]:
        self.in_step.set()
        if self.fails:
            assert self.fail.wait(SECONDS)
            raise RuntimeError("the device is gone")
        asked, self.waiting = self.waiting, []
        return [Event(each.id, 0, (1,), "yes", finish="stop") for each in asked]


@pytest.fixture
def replica() -> Iterator[Callable[[Any], Any]]:
    """Makes replicas of engines, whose threads end with the test: what they raise is seen in it."""
    from jora.serve.ray.replica import Replica, Started

    started: list[AsyncEngine] = []

    def make(engine: Any) -> Any:
        started.append(AsyncEngine(engine))
        started[-1].start()
        return Replica(lambda: Started(started[-1], None, None))  # type: ignore[arg-type]

    yield make
    for running in started:
        running.engine.fail.set()  # type: ignore[attr-defined]
        running.stop()


def ask(name: str) -> Request:
    return Request(name, (1, 2), SamplingOptions(max_tokens=1), streamed=False)


class Handle:
    """Ray Serve's, as far as streams go: replicas in their turn, and what they raise as Ray passes it on."""

    def __init__(self, *replicas: Any) -> None:
        self.replicas = list(replicas)

    def options(self, **_: Any) -> Handle:
        return self

    @property
    def stream(self) -> Handle:
        return self

    def remote(self, *args: Any) -> Items:
        return Items(self.replicas[0].stream(*args))


class Items:
    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self.items = items

    async def __anext__(self) -> Any:
        from ray.exceptions import RayTaskError

        try:
            return await anext(self.items)
        except StopAsyncIteration:
            raise
        except Exception as error:
            raise RayTaskError("stream", "", error).as_instanceof_cause() from None

    def cancel(self) -> None:
        pass


async def in_step(engine: Engine) -> None:
    assert await asyncio.to_thread(engine.in_step.wait, SECONDS)


def test_what_comes_while_the_engine_fails_is_lost_with_it(replica: Callable[[Any], Any]) -> None:
    """It is told by a RuntimeError that there is no engine: no bug, which another replica would have too."""
    from jora.serve.ray.wire import Change, EngineLost

    async def test() -> None:
        engine = Engine(fails=True)
        failing = replica(engine)

        async def stream(name: str) -> list[Any]:
            return [events async for events in failing.stream(ask(name), None, {})]

        tasks = [asyncio.create_task(stream("in the step"))]
        await in_step(engine)
        tasks.append(asyncio.create_task(stream("next")))
        tasks.append(asyncio.create_task(failing.change("a", Change(1, None))))
        tasks.append(asyncio.create_task(failing.adapters({"b": Change(2, None)})))
        await asyncio.sleep(0.05)
        engine.fail.set()
        for task in [*tasks, asyncio.create_task(stream("later"))]:
            with pytest.raises(EngineLost) as lost:
                await task
            assert str(lost.value.__cause__) == "the device is gone"

    asyncio.run(asyncio.wait_for(test(), SECONDS))


def test_an_error_of_an_engine_that_runs_stays_what_it_is(replica: Callable[[Any], Any]) -> None:
    async def test() -> None:
        engine = Engine()
        healthy = replica(engine)
        engine.submit = lambda request: exec("raise RuntimeError('a bug')")  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="a bug"):
            await anext(healthy.stream(ask("a"), None, {}))

    asyncio.run(asyncio.wait_for(test(), SECONDS))


def test_the_request_goes_to_another_replica(replica: Callable[[Any], Any]) -> None:
    from jora.serve.ray.backend import Replicas

    async def test() -> None:
        engine = Engine(fails=True)
        handle = Handle(replica(engine), replica(Engine()))
        backend = Replicas(handle)

        async def stream(name: str) -> list[Event]:
            return [event async for event in backend.stream(ask(name))]

        first = asyncio.create_task(stream("in the step"))
        await in_step(engine)
        second = asyncio.create_task(stream("next"))
        await asyncio.sleep(0.05)
        handle.replicas.pop(0)  # Ray puts another in its place
        engine.fail.set()
        for task in (first, second):
            assert [(event.text, event.finish) for event in await task] == [("yes", "stop")]
        assert await backend.drain(SECONDS)

    asyncio.run(asyncio.wait_for(test(), SECONDS))
