"""Random traces through the whole engine: right tokens, books that balance, nobody forgotten, nothing compiled."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.serve.engines import (
    BALLAST,
    GREEDY,
    Reference,
    ask,
    check,
    compilations,
    no_adapter_is_left,
    prompt,
    run,
    step,
    tokens,
)

from jora.errors import InputError
from jora.serve.adapters.loading import Loaded
from jora.serve.engine import Engine
from jora.serve.requests import Event, Request, UnknownAdapter
from jora.serve.scheduling.sequence import AdapterVersion, Sequence

NAMES = ("one", "two", "three", "eight")
Change = tuple[Literal["load", "unload"], str, str]  # what, a name, the directory that is loaded under it


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    adapter: str | None
    n: int
    client: str
    cancel: int | None  # so many steps later


def arrivals(random: Random) -> list[Arrival]:
    """Prompts of a family begin alike. Half of the traces are a flood, the others come as they are served."""
    span = random.choice([20, 150])
    return [
        Arrival(
            step=random.randrange(span),
            prompt=prompt(random.randrange(3), random.choice([1, 4, 13, 31, 32, 60, 60])),
            max_tokens=random.choice([1, 3, 24, 40]),
            adapter=random.choice([None, None, None, *NAMES]),
            n=random.choice([1, 1, 1, 3]),
            client=random.choice("abc"),
            cancel=random.choice([None, None, random.randrange(10), random.randrange(60)]),
        )
        for _ in range(20)
    ]


def changes(random: Random) -> dict[int, Change]:
    """By step."""
    kinds: list[Literal["load", "unload"]] = ["load", "load", "unload"]
    return {
        random.randrange(150): (random.choice(kinds), random.choice(NAMES), random.choice([*NAMES, "again"]))
        for _ in range(6)
    }


def options(random: Random) -> dict[str, Any]:
    return dict(
        pages=random.randint(60, 90),  # the longest request needs 52, and its adapter 8
        optimistic=random.random() < 0.7,
        prefix_cache=random.random() < 0.8,
        scheduler=random.choice(["vtc", "fcfs"]),
        cluster=random.choice([0, 1, 2]),
        host_adapters_bytes=random.choice([1 << 30, 20 << 10]),  # the latter holds two of the largest
    )


class Trace:
    """One run. seen: what happened in all runs."""

    def __init__(self, engine: Engine, reference: Reference, seen: Counter[str]):
        self.engine, self.reference, self.seen = engine, reference, seen
        self.serving: dict[str, str | None] = {name: name for name in NAMES}  # name -> directory that it stands for
        self.asked: dict[str, tuple[Request, str | None]] = {}
        self.events: dict[str, list[Event]] = {}
        self.cancelled: set[str] = set()
        self.work = 0

    def submit(self, arrival: Arrival) -> str | None:
        name = f"{len(self.asked)}"
        sampling = replace(GREEDY, max_tokens=arrival.max_tokens, n=arrival.n)
        request = Request(name, arrival.prompt, sampling, arrival.adapter, arrival.client)
        directory = None
        if arrival.adapter is not None and (directory := self.serving[arrival.adapter]) is None:
            with pytest.raises(UnknownAdapter):
                self.engine.submit(request)
            self.seen["unknown"] += 1
            return None
        self.engine.submit(request)
        self.asked[name], self.events[name] = (request, directory), []
        self.work += arrival.n * (len(arrival.prompt) + arrival.max_tokens + 10)
        return name

    def cancel(self, name: str) -> None:
        for sequence in self.engine._by_request.get(name, ()):
            self.seen[f"cancelled: {sequence.state}"] += 1
            self.cancelled.add(name)
        self.engine.cancel(name)

    def change(self, change: Change) -> None:
        what, name, directory = change
        used = any(self.asked[request][0].adapter == name for request in self.engine._by_request)
        if what == "load":
            self.engine.load_adapter(name, directory)
            self.serving[name] = directory
        elif self.serving[name] is None:
            return
        else:
            self.engine.unload_adapter(name)
            self.serving[name] = None
        self.seen[f"{what} in use"] += used

    def step(self) -> None:
        for event in step(self.engine):
            assert event.request not in self.cancelled, "an event after the end"
            self.events[event.request].append(event)

    def run_out(self) -> None:
        """To the end. Each step moves the oldest on, so the work bounds their number, but for waits for the disk."""
        steps = 0
        while self.engine.has_work:
            steps += self.engine.scheduler.running_count > 0
            assert steps <= 8 * self.work, "somebody starves"
            self.step()

    def check(self) -> None:
        for name, (request, directory) in self.asked.items():
            for index in range(request.sampling.n):
                own = [event for event in self.events[name] if event.index == index]
                found = tokens(own, index)
                ended = [event.finish for event in own if event.finish]
                assert ended == ["length"] or (name in self.cancelled and ended in ([], ["length"]))
                count = request.sampling.max_tokens if ended else len(found)
                assert found == self.reference(directory, request.prompt, count), (name, request.adapter, directory)
                self.seen["whole answers"] += bool(ended)
        self.seen["preempted"] += self.engine.stats().preemptions
        self.seen["cached"] += self.engine.stats().cached_tokens


def delay_loads(engine: Engine, seconds: float) -> None:
    load = engine.loader.load

    def slow(version: AdapterVersion) -> Loaded:
        time.sleep(seconds)
        return load(version)

    engine.loader.load = slow  # type: ignore[method-assign]


def all_pages_back(engine: Engine) -> None:
    """Every adapter is unloaded; then nothing is left but the base's cached prompts, which go when pages are needed."""
    for name in engine.catalogue.names():
        engine.unload_adapter(name)
    no_adapter_is_left(engine)
    assert not engine.catalogue._entries  # no version is known any more
    ballast = engine.pages.owned(BALLAST)
    assert engine.pages.make_free(engine.pages.total - 1 - ballast)
    check(engine)


@pytest.mark.slow
def test_random_traces(engine_of: Callable[..., Engine], reference: Reference) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=20, derandomize=True, deadline=None, phases=[Phase.generate])
    @given(seed=st.integers(0, 1 << 32))
    def one(seed: int) -> None:
        random = Random(seed)
        chosen = options(random)
        trace = Trace(engine_of(**chosen), reference, seen)
        delay_loads(trace.engine, random.choice([0.0, 0.02]))
        coming, changing = arrivals(random), changes(random)
        cancels: dict[int, list[str]] = {}
        for now in range(210):
            if now in changing:
                trace.change(changing[now])
            for arrival in (arrival for arrival in coming if arrival.step == now):
                name = trace.submit(arrival)
                if name is not None and arrival.cancel is not None:
                    cancels.setdefault(now + arrival.cancel, []).append(name)
            for name in cancels.get(now, ()):
                trace.cancel(name)
            trace.step()
        trace.run_out()
        trace.check()
        assert chosen["optimistic"] or trace.engine.stats().preemptions == 0
        all_pages_back(trace.engine)

    with compilations() as compiled:
        one()
    assert not compiled
    # The traces were worth it: everything that they are about happened. How often turns on how fast adapters load.
    for what in ("prefill", "running"):
        assert seen[f"cancelled: {what}"], seen
    assert seen["cancelled: waiting"] + seen["cancelled: loading"] > 10, seen
    for what in ("preempted", "load in use", "unload in use", "unknown"):
        assert seen[what], seen
    assert seen["cached"] > 100 and seen["whole answers"] > 100, seen


# --- preemption ---

CROWD = [
    *(ask(f"greedy {i}", prompt(i, 9 + 5 * i), (None, "two", "three")[i % 3], max_tokens=40) for i in range(5)),
    ask("drawn", prompt(5, 30), "two", temperature=1.3, top_p=0.9, seed=11, n=3, max_tokens=30),
    ask("counted", prompt(6, 25), presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.4, max_tokens=40),
    ask("scored", prompt(7, 33), "one", logprobs=2, prompt_logprobs=1, max_tokens=25),
    ask("soft", prompt(8, 20), "soft", max_tokens=30),
    ask("stopped", prompt(9, 17), stop_token_ids=(99,), min_tokens=5, max_tokens=35),
]


def answers(events: dict[str, list[Event]]) -> dict[tuple[str, int], list[tuple]]:
    """What clients get, token by token; log probabilities to four digits, as rows of other batches round."""
    found: dict[tuple[str, int], list[tuple]] = {}
    for event in (event for own in events.values() for event in own):
        scores = [
            (s.token, round(s.logprob, 3), s.rank) for s in (*event.logprobs, *(event.prompt_logprobs or ())) if s
        ]
        what = (event.tokens, event.text, scores, event.finish, event.usage.completion)
        found.setdefault((event.request, event.index), []).append(what)
    return found


def test_preemption_changes_no_answer(engine_of: Callable[..., Engine], reference: Reference) -> None:
    """Whatever a request asks for: draws, counts, log probabilities and soft prompts begin again where they were."""
    roomy = engine_of()
    expected = answers(run(roomy, *CROWD))
    assert roomy.stats().preemptions == 0
    tight = engine_of(pages=60, optimistic=True)
    with compilations() as compiled:
        found = answers(run(tight, *CROWD))
    assert not compiled
    assert found == expected
    assert tight.stats().preemptions > 5
    for request in CROWD[:5]:
        assert [e[0][0] for e in found[request.id, 0]] == reference(request.adapter, request.prompt, 40)
    all_pages_back(tight)


def test_without_optimism_nobody_is_preempted(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(pages=60)
    answered = answers(run(engine, *CROWD))
    assert engine.stats().preemptions == 0 and len(answered) == 12


# --- versions ---


def until(engine: Engine, name: str, reached: Callable[[Sequence], bool]) -> list[Event]:
    """Step until a request is so far."""
    events: list[Event] = []
    while not reached(engine._by_request[name][0]):
        events += step(engine)
    return events


STATES: dict[str, Callable[[Sequence], bool]] = {
    "waiting": lambda s: s.state == "waiting",
    "loading": lambda s: s.state == "loading",
    "prefill": lambda s: s.state == "prefill" and s.computed > 0,
    "running": lambda s: s.state == "running" and s.generated > 2,
    "preempted": lambda s: s.epoch > 0,
}


@pytest.mark.parametrize("what", ["load", "unload"])
@pytest.mark.parametrize("state", STATES)
def test_a_request_ends_with_the_version_it_began_with(
    engine_of: Callable[..., Engine], reference: Reference, state: str, what: str
) -> None:
    """Replaced or unloaded while a request waits, is in prefill, decodes, or has been put back. What it leaves in the
    prefix cache is for nobody."""
    engine = engine_of(pages=100, optimistic=True)
    delay_loads(engine, 0.02)
    events = []
    if state in ("waiting", "preempted"):  # all rows are taken; or the one before needs all pages in the end
        busy = dict(n=4, max_tokens=20) if state == "waiting" else dict(max_tokens=100)
        engine.host.fetch(engine.catalogue.resolve("two"))  # or it might come when the one before has ended
        engine.submit(ask("busy", prompt(29, 60), **busy))
        events += until(engine, "busy", lambda s: s.generated > 2)
    old = ask("old", prompt(30, 60), "two", max_tokens=50)
    engine.submit(old)
    events += until(engine, "old", STATES[state])
    if what == "load":
        engine.load_adapter("two", "again")
        engine.submit(ask("new", old.prompt, "two"))
    else:
        engine.unload_adapter("two")
        with pytest.raises(UnknownAdapter):
            engine.submit(ask("new", old.prompt, "two"))
    while engine.has_work:
        events += step(engine)
    assert tokens([e for e in events if e.request == "old"]) == reference("two", old.prompt, 50)
    cache = engine.scheduler._cache
    assert cache is not None
    if what == "load":
        new = [event for event in events if event.request == "new"]
        assert tokens(new) == reference("again", old.prompt) and new[-1].usage.cached == 0
        assert (engine.stats().pool_pages["adapter"] - engine.pages.owned(BALLAST), len(engine.host)) == (2, 1)
        assert cache._versions.keys() <= {None, engine.catalogue.resolve("two")}
    else:
        no_adapter_is_left(engine)
        assert cache._versions.keys() <= {None}
        engine.load_adapter("two", "again")
        assert run(engine, ask("new", old.prompt, "two"))["new"][-1].usage.cached == 0
    again = run(engine, ask("again", old.prompt, "two"))["again"]
    assert tokens(again) == reference("again", old.prompt) and again[-1].usage.cached == 56


def test_an_adapter_that_comes_back_meets_no_old_prompts(engine: Engine, reference: Reference) -> None:
    for directory, cached in (("two", 0), ("two", 36), ("again", 0), ("again", 36), ("two", 0), ("two", 36)):
        if not cached:
            engine.load_adapter("two", directory)
        events = run(engine, ask("a", prompt(31, 40), "two"))["a"]
        assert (events[-1].usage.cached, tokens(events)) == (cached, reference(directory, prompt(31, 40)))


def test_files_that_change_are_a_new_version(
    engine_of: Callable[..., Engine], reference: Reference, shelf: Path, tmp_path: Path
) -> None:
    """Renamed into place while a request with the old ones runs, as trainers do."""
    shutil.copytree(shelf / "two", tmp_path / "it")
    engine = engine_of(tmp_path)
    engine.submit(ask("old", prompt(32, 20), "it", max_tokens=16))
    events = until(engine, "old", STATES["running"])
    shutil.copytree(shelf / "again", tmp_path / ".new")
    os.rename(tmp_path / "it", tmp_path / ".old")
    os.rename(tmp_path / ".new", tmp_path / "it")
    engine.submit(ask("new", prompt(32, 20), "it"))
    found: dict[str, list[Event]] = {"old": events, "new": []}
    while engine.has_work:
        for event in step(engine):
            found[event.request].append(event)
    assert tokens(found["old"]) == reference("two", prompt(32, 20), 16)
    assert tokens(found["new"]) == reference("again", prompt(32, 20))
    assert found["new"][-1].usage.cached == 0
    assert engine.stats().pool_pages["adapter"] == 2


def test_an_adapter_that_cannot_be_read_ends_its_requests_alone(
    engine_of: Callable[..., Engine], reference: Reference, shelf: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(shelf / name, tmp_path / name)
    weights = tmp_path / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    engine = engine_of(tmp_path)
    events = run(
        engine,
        ask("broken", prompt(33, 20), "one", n=2),
        ask("whole", prompt(33, 20), "two"),
        ask("base", prompt(33, 20)),
    )
    assert [(e.index, e.finish, e.tokens) for e in events["broken"]] == [(0, "error", ()), (1, "error", ())]
    assert "'one'" in (events["broken"][0].error or "") and str(tmp_path) not in (events["broken"][0].error or "")
    assert tokens(events["whole"]) == reference("two", prompt(33, 20))
    assert tokens(events["base"]) == reference(None, prompt(33, 20))
    before, entries = engine.stats().adapters["known"], set(engine.catalogue._entries)
    with pytest.raises(InputError, match="the file has"):
        engine.load_adapter("two", "one")  # what is served stays
    assert engine.stats().adapters["known"] == before and set(engine.catalogue._entries) == entries
    assert tokens(run(engine, ask("still", prompt(33, 21), "two"))["still"]) == reference("two", prompt(33, 21))
