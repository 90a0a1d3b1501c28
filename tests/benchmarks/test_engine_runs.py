"""Traces played to an engine that gives every running request one token a step."""

from types import SimpleNamespace

import pytest
from benchmarks.serving.engine_runs import decode_time, play, play_merged
from benchmarks.serving.trace import Arrival

from jora.serve.requests import Event


class FakeEngine:
    """At most `rows` at once; a step prefills one request (its first token) and decodes the others."""

    def __init__(self, rows=4, fails=None):
        self.rows, self.fails = rows, fails
        self.waiting, self.running = [], {}
        self.names, self.cancelled = [], []

    @property
    def has_work(self):
        return bool(self.waiting or self.running)

    def submit(self, request):
        self.names.append((request.id, request.adapter))
        self.waiting.append(request)

    def cancel(self, name):
        self.cancelled.append(name)
        self.waiting = [r for r in self.waiting if r.id != name]
        self.running.pop(name, None)

    def step(self):
        if self.waiting and len(self.running) < self.rows:
            request = self.waiting.pop(0)
            self.running[request.id] = request.sampling.max_tokens
        events = []
        for name in list(self.running):
            self.running[name] -= 1
            done = self.running[name] == 0
            if done:
                del self.running[name]
            finish = "error" if name == self.fails else "length" if done else None
            events.append(Event(name, tokens=(7,), finish=finish, error="broken" if finish == "error" else None))
        return events


class Stalling(FakeEngine):
    """Leaves a row out now and then."""

    def step(self):
        return super().step()[1:] if len(self.running) == 4 else super().step()


TRACE = [Arrival(n, 0.002 * n, (5,) * (n + 1), 3 + n, adapter=n % 2) for n in range(6)]


def test_every_request_is_answered_whole_and_not_before_it_comes():
    engine = FakeEngine()
    served = play(engine, TRACE, "run")
    assert [(s.number, s.arrival, s.inputs, len(s.tokens)) for s in served] == [
        (a.number, a.time, len(a.prompt), a.output) for a in TRACE
    ]
    assert all(s.finished and s.times[0] >= s.arrival and list(s.times) == sorted(s.times) for s in served)
    assert engine.names[1] == ("run/1", "adapter-00001")
    assert engine.cancelled == []


def test_a_run_that_is_cut_off_leaves_the_engine_empty():
    engine = FakeEngine(rows=2)
    trace = [Arrival(n, 0.0 if n < 4 else 1e6, (5,), 10**9, client="c") for n in range(5)]
    served = play(engine, trace, "run", until=0.05)
    assert [(s.number, s.finished, s.client) for s in served] == [(0, False, "c"), (1, False, "c")]
    assert sorted(engine.cancelled) == [f"run/{n}" for n in range(4)]
    assert not engine.has_work


def test_a_request_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="run/2 ended with error: broken"):
        play(FakeEngine(fails="run/2"), TRACE, "run")


def test_merged_switching_serves_who_waits_for_the_oldest_ones_adapter():
    engine, switches = FakeEngine(), []
    merger = SimpleNamespace(switch=switches.append)
    trace = [Arrival(n, 0.0, (5,), 2, adapter=a) for n, a in enumerate([1, 0, 1, 2, 0])]
    served = play_merged(engine, merger, trace, "run", limit=60.0)
    assert switches == [1, 0, 2]
    assert engine.names == [(f"run/{n}", None) for n in (0, 2, 1, 4, 3)]
    assert all(s.finished for s in served) and len(served) == 5
    assert play_merged(engine, merger, trace, "again", limit=0.0) == []


def test_decode_steps_are_timed_when_all_rows_decode():
    engine = FakeEngine(rows=4)
    took = decode_time(engine, 4, 2, prompt=8, steps=5, vocabulary=50, run="r")
    assert [adapter for _, adapter in engine.names] == ["adapter-00000", "adapter-00001"] * 2
    # Rows have 12, 11, 10 and 9 tokens when the last has prefilled (4 steps), skipped ones (4) and half of 5 included.
    assert took.context == pytest.approx(8 + (4 + 3 + 2 + 1) / 4 + 4 + 2.5)
    assert took.seconds > 0 and not engine.has_work
    with pytest.raises(SystemExit, match="not decode steps alone"):
        decode_time(Stalling(rows=4), 4, 0, prompt=8, steps=5, vocabulary=50, run="r")
