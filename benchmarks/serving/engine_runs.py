"""The engine as a contestant: a trace played to it, merged switching around it, and the time of its decode steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .bases import adapter_name
from .metrics import Served
from .trace import FIRST_TOKEN, Arrival

SKIP = 4  # decode steps before those that are timed: the first may still wait for a prefill


def open_engine(base: str, adapters: str | None, options: dict[str, Any]) -> Any:
    """An engine on the base's directory that serves every adapter of a directory; None: the base alone."""
    from jora.models.model import load_model
    from jora.serve.engine import Engine
    from jora.serve.options import EngineOptions

    model = load_model(base, dtype="float32")
    engine = Engine(model, EngineOptions(**options), adapters)
    engine.warm_up()
    return engine


def request(arrival: Arrival, run: str, *, adapted: bool = True) -> Any:
    """The engine's request of an arrival: greedy, of exactly its output length."""
    from jora.serve.requests import Request, SamplingOptions

    name = adapter_name(arrival.adapter) if adapted and arrival.adapter is not None else None
    sampling = SamplingOptions(max_tokens=arrival.output, temperature=0.0, ignore_eos=True)
    return Request(f"{run}/{arrival.number}", arrival.prompt, sampling, name, arrival.client)


class Tape:
    """When the tokens of each request came."""

    def __init__(self, trace: Sequence[Arrival], run: str, start: float) -> None:
        self._start = start
        self._arrivals = {f"{run}/{arrival.number}": arrival for arrival in trace}
        self._times: dict[str, list[float]] = {name: [] for name in self._arrivals}
        self._tokens: dict[str, list[int]] = {name: [] for name in self._arrivals}

    def record(self, events: Sequence[Any]) -> None:
        """What one step of the engine said; a request that failed ends the benchmark."""
        now = time.perf_counter() - self._start
        for event in events:
            if event.finish not in (None, "length", "cancelled"):
                raise SystemExit(f"{event.request} ended with {event.finish}: {event.error}")
            if event.request in self._times:
                self._times[event.request] += [now] * len(event.tokens)
                self._tokens[event.request] += event.tokens

    def served(self) -> Iterator[Served]:
        """Every request that got a token."""
        for name, arrival in self._arrivals.items():
            times = tuple(self._times[name])
            if times:
                about = (arrival.number, arrival.time, len(arrival.prompt), times, arrival.client)
                yield Served(*about, tuple(self._tokens[name]), finished=len(times) == arrival.output)

    def open(self) -> list[str]:
        """Requests that have not got all their tokens."""
        return [name for name, arrival in self._arrivals.items() if len(self._times[name]) < arrival.output]


def play(engine: Any, trace: Sequence[Arrival], run: str, until: float | None = None) -> list[Served]:
    """Submit every request at its time, and step the engine until all are answered, or until so many seconds."""
    waiting, start = deque(trace), time.perf_counter()
    tape = Tape(trace, run, start)
    while waiting or engine.has_work:
        now = time.perf_counter() - start
        if until is not None and now >= until:
            break
        while waiting and waiting[0].time <= now:
            engine.submit(request(waiting.popleft(), run))
        if engine.has_work:
            tape.record(engine.step())
        else:
            time.sleep(max(waiting[0].time - (time.perf_counter() - start), 0.0))
    submitted = set(tape.open()) - {f"{run}/{arrival.number}" for arrival in waiting}
    found = list(tape.served())
    _clear(engine, submitted)
    return found


def _clear(engine: Any, names: set[str]) -> None:
    for name in names:
        engine.cancel(name)
    while engine.has_work:
        engine.step()


# --- merged, one adapter at a time ---


class Merger:
    """Puts one LoRA adapter at a time into the engine's weights; adapters stay in memory once read."""

    def __init__(self, engine: Any, adapters: str) -> None:
        import jax

        self._engine, self._directory = engine, Path(adapters)
        self._base = engine.model.params
        self._current: int | None = None
        self._known: dict[int, Any] = {}
        self._merge = jax.jit(_merged_weights)

    def switch(self, number: int) -> None:
        """Merge this adapter, unless it is the one that is merged already."""
        from dataclasses import replace

        from jora.methods.storage import load_adapter

        if number == self._current:
            return
        if number not in self._known:
            loaded = load_adapter(self._directory / adapter_name(number), self._engine.model)
            self._known[number] = loaded.state
        weights = self._merge(self._base.layers.weights, self._known[number].trained, self._known[number].constant)
        params = replace(self._base, layers=replace(self._base.layers, weights=weights))
        set_params(self._engine, params)
        self._current = number


def _merged_weights(weights: Any, factors: Any, scales: Any) -> Any:
    """W + s A B of every target: weights [L, *in, *out], A [L, *in, r], B [L, r, *out], s [L]."""
    import jax
    import jax.numpy as jnp

    product = jax.vmap(lambda w, a, b, s: w + jnp.tensordot(a, b * s, 1))
    new = {t: product(weights[t], part["a"], part["b"], scales[t]) for t, part in factors.items()}
    return {**weights, **new}


def set_params(engine: Any, params: Any) -> None:
    """Have the engine compute with other weights of the same shapes."""
    engine.model.params = params


def play_merged(engine: Any, merger: Merger, trace: Sequence[Arrival], run: str, limit: float) -> list[Served]:
    """The oldest waiting request chooses the adapter; all that wait for it are served with it, then the next.

    limit: no group begins later than after so many seconds.
    """
    waiting, start = list(trace), time.perf_counter()
    tape = Tape(trace, run, start)
    while waiting and (now := time.perf_counter() - start) < limit:
        if waiting[0].time > now:
            time.sleep(waiting[0].time - now)
            continue
        adapter = waiting[0].adapter
        group = [a for a in waiting if a.adapter == adapter and a.time <= now]
        waiting = [a for a in waiting if a not in group]
        assert adapter is not None
        merger.switch(adapter)
        for arrival in group:
            engine.submit(request(arrival, run, adapted=False))
        while engine.has_work:
            tape.record(engine.step())
    return list(tape.served())


# --- decode steps ---


class DecodeTime(NamedTuple):
    """Seconds of one decode step, and the mean context of its rows in tokens."""

    seconds: float
    context: float


def answer_tokens(rows: int, steps: int) -> int:
    """Enough that no row ends while steps are timed: the first rows decode while the others prefill."""
    return 4 * rows + SKIP + steps


def load_all(engine: Any, adapters: int) -> None:
    """Have every adapter used once, so that no timing includes its first load."""
    play(engine, [Arrival(n, 0.0, (FIRST_TOKEN,), 2, n) for n in range(adapters)], "load")


def decode_time(
    engine: Any, rows: int, distinct: int, prompt: int, steps: int, vocabulary: int, run: str
) -> DecodeTime:
    """Time decode steps of `rows` sequences that use `distinct` adapters in turn (0: the base alone)."""
    draws = np.random.default_rng(0).integers(FIRST_TOKEN, vocabulary, (rows, prompt))
    prompts = [tuple(row.tolist()) for row in draws]
    trace = [
        Arrival(n, 0.0, p, answer_tokens(rows, steps), n % distinct if distinct else None)
        for n, p in enumerate(prompts)
    ]
    for arrival in trace:
        engine.submit(request(arrival, run))
    got = dict.fromkeys((f"{run}/{n}" for n in range(rows)), 0)

    def step() -> int:
        events = engine.step()
        for event in events:
            got[event.request] += len(event.tokens)
        return sum(len(event.tokens) for event in events)

    while min(got.values()) == 0:
        step()
    for _ in range(SKIP):
        step()
    start = time.perf_counter()
    made = sum(step() for _ in range(steps))
    seconds = (time.perf_counter() - start) / steps
    if made != rows * steps:
        raise SystemExit(f"{run}: {steps} steps of {rows} rows gave {made} tokens: these were not decode steps alone")
    context = prompt + sum(got.values()) / rows - steps / 2
    _clear(engine, set(got))
    return DecodeTime(seconds, context)
