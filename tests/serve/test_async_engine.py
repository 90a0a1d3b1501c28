"""The engine behind asyncio: many streams at once, who leaves early, adapters that come and go, and its failure."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.serve.engines import Reference, ask, check, compilations, no_adapter_is_left, prompt, text, tokens

from jora.errors import InputError
from jora.serve.async_engine import AsyncEngine
from jora.serve.engine import Engine
from jora.serve.requests import Event, Rejected, Request, UnknownAdapter

SECONDS = 60  # no test should take so long: what hangs is told


def in_loop(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, SECONDS)

    asyncio.run(bounded())


@asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[AsyncEngine]:
    """It runs within; behind, the books are checked."""
    running = AsyncEngine(engine)
    running.start()
    try:
        yield running
    finally:
        running.stop()
    check(engine)


async def collect(engine: AsyncEngine, request: Request) -> list[Event]:
    return [event async for event in engine.stream(request)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


class Brake:
    """The engine makes as many steps as it is allowed; between two it goes on taking what callers hand over."""

    def __init__(self, engine: Engine):
        self._engine, self._step, self._allowed = engine, engine.step, threading.Semaphore(0)
        self.steps = 0
        engine.step = self._braked  # type: ignore[method-assign]

    def _braked(self) -> list[Event]:
        if not self._allowed.acquire(timeout=0.001):
            return []
        events = self._step()
        check(self._engine)
        self.steps += 1
        return events

    async def allow(self, steps: int) -> None:
        """So many more, and wait for them."""
        wanted = self.steps + steps
        self._allowed.release(steps)
        await until(lambda: self.steps >= wanted or not self._engine.has_work)

    def release(self) -> None:
        self._engine.step = self._step  # type: ignore[method-assign]


# --- streams ---


def test_fifty_streams_at_once(engine: Engine, reference: Reference) -> None:
    names = (None, "one", "two", "three", "eight")
    requests = [
        ask(f"{i}", prompt(i % 20, 1 + 7 * (i % 9)), names[i % 5], n=1 + (i % 10 == 0), max_tokens=1 + i % 16)
        for i in range(50)
    ]

    async def test() -> None:
        async with started(engine) as running:
            found = await asyncio.gather(*(collect(running, request) for request in requests))
            assert (await running.stats()).waiting == 0
            assert not running._readers
        for request, events in zip(requests, found, strict=True):
            for index in range(request.sampling.n):
                own = [event for event in events if event.index == index]
                expected = reference(request.adapter, request.prompt, request.sampling.max_tokens or 0)
                assert tokens(own, index) == expected
                assert [event.finish for event in own if event.finish] == ["length"]
                assert own[-1].usage.completion == request.sampling.max_tokens

    with compilations() as compiled:
        in_loop(test())
    assert not compiled


def test_a_slow_reader_gets_everything_joined_and_holds_up_nobody(engine: Engine, reference: Reference) -> None:
    asked = ask("slow", prompt(1, 9), n=2, max_tokens=30, logprobs=1, prompt_logprobs=0)

    async def test() -> None:
        async with started(engine) as running:
            slow = running.stream(asked)
            events = [await anext(slow)]
            for i in range(5):
                await collect(running, ask(f"{i}", prompt(2, 20), "two", max_tokens=16))
            await until(lambda: not engine.has_work)
            await asyncio.sleep(0)
            events += [event async for event in slow]
        assert len(events) < 10
        for index in range(2):
            own = [event for event in events if event.index == index]
            assert tokens(own, index) == reference(None, asked.prompt, 30)
            assert [each.token for event in own for each in event.logprobs] == tokens(own, index)
            assert len(text(own)) > 0 or index
            scored = [event.prompt_logprobs for event in own if event.prompt_logprobs]
            assert len(scored) == 1 and len(scored[0]) == 9
            assert own[-1].finish == "length"

    in_loop(test())


# --- who leaves early ---

LEAVING = [
    *((state, "the task is cancelled") for state in ("waiting", "loading", "prefill", "running")),
    ("running", "the iterator is closed"),
    ("running", "the iterator is dropped"),
]


@pytest.mark.parametrize(("state", "how"), LEAVING)
def test_who_leaves_frees_everything(engine: Engine, reference: Reference, state: str, how: str) -> None:
    """Whenever that is; who stays is not touched."""
    others = [ask(f"other {i}", prompt(3 + i, 5), (None, "two")[i % 2], max_tokens=60) for i in range(2)]
    leaves = ask("leaves", prompt(9, 100), "three", max_tokens=40, n=2 if state != "waiting" else 5)
    arrive = threading.Event()
    if state == "loading":
        load = engine.loader.load

        def late(version: Any) -> Any:
            assert version.name != "three" or arrive.wait(SECONDS)
            return load(version)

        engine.loader.load = late  # type: ignore[method-assign]

    async def test() -> None:
        brake = Brake(engine)
        async with started(engine) as running:
            staying = [asyncio.create_task(collect(running, other)) for other in others]
            await until(lambda: all(engine.knows(other.id) for other in others))
            while engine.scheduler.running_count < 2:  # "two" has to be read first
                await brake.allow(1)
            stream = running.stream(leaves)
            first: asyncio.Task[Any] = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
            await until(lambda: engine.knows("leaves"))
            sequences = list(engine._by_request["leaves"])
            while state not in {s.state for s in sequences} or (state == "running" and not first.done()):
                await brake.allow(1)
                await asyncio.sleep(0.001)
            if how == "the task is cancelled":
                while first.done():  # each of two answers may have said something
                    first = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
                    await asyncio.sleep(0)
                first.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await first
            elif how == "the iterator is closed":
                await stream.aclose()
            else:
                del stream, first
                gc.collect()
            await until(lambda: not engine.knows("leaves"))
            arrive.set()
            assert all(s.state == "finished" and s.slot is None for s in sequences)
            pages = {owner for owner in engine.pages._counts if owner[0] == "kv"}  # type: ignore[index]
            assert pages == {("kv", (other.id, 0)) for other in others}
            assert (engine.scheduler.running_count, engine.scheduler.waiting_count) == (2, 0)
            brake.release()
            for other, events in zip(others, await asyncio.gather(*staying), strict=True):
                assert tokens(events) == reference(other.adapter, other.prompt, 60)
            assert (await running.stats()).pool_pages["kv"] == 0
            assert not running._readers

    in_loop(test())


def test_who_leaves_before_being_taken_is_forgotten(engine: Engine) -> None:
    """The engine is in the middle of a step when a request comes and goes."""

    async def test() -> None:
        brake = Brake(engine)
        async with started(engine) as running:
            staying = asyncio.create_task(collect(running, ask("stays", prompt(3, 5))))
            await until(lambda: engine.knows("stays"))
            for i in range(10):
                task = asyncio.create_task(collect(running, ask(f"{i}", prompt(4, 5))))
                await asyncio.sleep(0)
                task.cancel()
            brake.release()
            assert len(tokens(await staying)) == 8
            assert await running.drain()
            assert not running._readers and engine.stats().service["default"] == 5 + 2 * 8

    in_loop(test())


# --- adapters ---


def test_adapters_come_and_go_under_streams(engine: Engine, reference: Reference) -> None:
    async def test() -> None:
        async with started(engine) as running:
            streams: list[tuple[str, Request, asyncio.Task[list[Event]]]] = []

            async def begin(directory: str) -> None:
                for i in range(6):
                    asked = ask(f"{len(streams)}", prompt(i, 10 + 9 * i), "it", max_tokens=20)
                    streams.append((directory, asked, asyncio.create_task(collect(running, asked))))
                await until(lambda: engine.knows(streams[-1][1].id))

            for directory in ("two", "again", "one", "two"):
                assert (await running.load_adapter("it", directory)).name == "it"
                await begin(directory)
            assert "it" in [info.name for info in await running.adapters()]
            await running.unload_adapter("it")
            with pytest.raises(UnknownAdapter):
                await collect(running, ask("late", prompt(0, 5), "it"))
            with pytest.raises(UnknownAdapter):
                await running.unload_adapter("it")
            with pytest.raises(InputError):
                await running.load_adapter("it", "../outside")
            for directory, asked, task in streams:
                events = await task
                assert tokens(events) == reference(directory, asked.prompt, 20), (directory, asked)
        no_adapter_is_left(engine)

    in_loop(test())


def test_what_is_replaced_is_freed_without_a_further_request(engine: Engine) -> None:
    async def test() -> None:
        async with started(engine) as running:
            await running.load_adapter("it", "two")
            await collect(running, ask("a", prompt(1, 5), "it"))
            assert (len(engine.resident), len(engine.host)) == (1, 1)
            await running.load_adapter("it", "again")
            assert not engine.has_work
            assert (len(engine.resident), len(engine.host), len(engine._active_set.members)) == (0, 1, 0)
            assert (await running.stats()).pool_pages["adapter"] == 0

    in_loop(test())


def test_an_adapter_that_fails_ends_its_streams_alone(
    engine_of: Callable[..., Engine], reference: Reference, shelf: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(shelf / name, tmp_path / name)
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"no tensors")

    async def test() -> None:
        async with started(engine_of(tmp_path)) as running:
            broken, whole = await asyncio.gather(
                collect(running, ask("broken", prompt(1, 5), "one")),
                collect(running, ask("whole", prompt(1, 5), "two")),
            )
        assert [event.finish for event in broken] == ["error"] and "'one'" in (broken[0].error or "")
        assert tokens(whole) == reference("two", prompt(1, 5))

    in_loop(test())


# --- what is not taken ---


def test_what_is_refused_is_raised(engine_of: Callable[..., Engine], reference: Reference) -> None:
    engine = engine_of(max_queue=2)

    async def test() -> None:
        brake = Brake(engine)
        async with started(engine) as running:
            staying = [asyncio.create_task(collect(running, ask(f"{i}", prompt(i, 5)))) for i in range(2)]
            await until(lambda: engine.knows("1"))
            with pytest.raises(Rejected) as rejected:
                await collect(running, ask("more", prompt(3, 5)))
            assert rejected.value.retry_after > 0
            with pytest.raises(UnknownAdapter):
                await collect(running, ask("unknown", prompt(3, 5), "absent"))
            with pytest.raises(InputError, match="leaves none"):
                await collect(running, ask("long", prompt(3, 200)))
            with pytest.raises(InputError, match="this id"):
                await collect(running, ask("1", prompt(3, 5)))
            assert running._readers.keys() == {"0", "1"}
            brake.release()
            for i, task in enumerate(staying):
                assert tokens(await task) == reference(None, prompt(i, 5))

    in_loop(test())


# --- the end ---


def test_drain_waits_for_the_last_answer(engine: Engine) -> None:
    async def test() -> None:
        brake = Brake(engine)
        async with started(engine) as running:
            assert await running.drain(SECONDS)
            task = asyncio.create_task(collect(running, ask("a", prompt(1, 5))))
            await until(lambda: engine.knows("a"))
            begun = time.monotonic()
            assert not await running.drain(0.1)
            assert time.monotonic() - begun < 5 and not task.done()
            brake.release()
            assert await running.drain()
            assert not engine.has_work and len(tokens(await task)) == 8

    in_loop(test())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_ends_every_stream_and_every_call(engine: Engine) -> None:
    """Nobody waits for ever: not who reads, nor who was about to be taken, nor who comes later."""
    brake = Brake(engine)

    async def test() -> None:
        running = AsyncEngine(engine)
        running.start()
        several = asyncio.create_task(collect(running, ask("several", prompt(1, 5), n=3, max_tokens=20)))
        one = asyncio.create_task(collect(running, ask("one", prompt(2, 5), "two")))
        await until(lambda: engine.knows("several") and engine.knows("one"))
        await brake.allow(4)
        # One of three answers has ended when the engine fails: it is not ended again.
        live = next(live for s, live in engine._live.items() if (s.request.id, s.index) == ("several", 1))
        live.answer.max_tokens = live.answer.count + 1
        while live.sequence.state != "finished":
            await brake.allow(1)
        in_step, fail = threading.Event(), threading.Event()

        def broken() -> list[Event]:
            in_step.set()
            assert fail.wait(SECONDS)
            raise RuntimeError("the device is gone")

        engine.step = broken  # type: ignore[method-assign]
        await until(in_step.is_set)
        coming = asyncio.create_task(collect(running, ask("next", prompt(3, 5))))
        asking = asyncio.create_task(running.stats())
        await asyncio.sleep(0.01)
        fail.set()
        events = [*await several, *await one]
        ends = [(e.request, e.index, e.finish) for e in events if e.finish is not None]
        assert sorted(ends) == [
            ("one", 0, "error"),
            ("several", 0, "error"),
            ("several", 1, "length"),
            ("several", 2, "error"),
        ]
        assert {e.error for e in events if e.finish == "error"} == {"the engine failed: the device is gone"}
        for task in (coming, asking, asyncio.create_task(running.stats())):
            with pytest.raises(RuntimeError, match="stopped after an error"):
                await task
        with pytest.raises(RuntimeError, match="stopped after an error"):
            await collect(running, ask("later", prompt(3, 5)))
        assert str(running.failure) == "the device is gone"
        running.stop()

    in_loop(test())
