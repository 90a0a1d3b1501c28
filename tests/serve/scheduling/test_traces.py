"""Random traces: pages are conserved and right, nobody starves, the pool is never overrun."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serve.scheduling.simulation import Simulation, pool_layout

from jora.errors import InputError
from jora.serve.options import EngineOptions
from jora.serve.scheduling.sequence import AdapterVersion, Sequence

PAGE = 4
WINDOWS = [(None,), (6, None), (5, 12, None, 5), (7,)]


@dataclass(frozen=True)
class Arrival:
    step: int
    family: int  # prompts of a family begin alike
    prompt: int
    max_tokens: int
    stop_after: int
    adapter: int  # 0 is the base
    client: str
    cancel: int | None  # so many steps after arrival
    deadline: int | None
    slots: int
    copies: int


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 40),
    family=st.integers(0, 2),
    prompt=st.integers(1, 30),
    max_tokens=st.integers(1, 24),
    stop_after=st.integers(1, 30),
    adapter=st.integers(0, 3),
    client=st.sampled_from("abc"),
    cancel=st.one_of(st.none(), st.integers(0, 30)),
    deadline=st.one_of(st.none(), st.none(), st.integers(0, 40)),
    slots=st.sampled_from([0, 0, 3]),
    copies=st.sampled_from([1, 1, 2]),
)


@st.composite
def engines(draw: st.DrawFn) -> EngineOptions:
    return EngineOptions(
        page_tokens=PAGE,
        max_batch=draw(st.sampled_from([1, 2, 4, 9])),
        chunk=draw(st.sampled_from([4, 8, 16])),
        scheduler=draw(st.sampled_from(["vtc", "fcfs"])),
        optimistic=draw(st.booleans()),
        prefix_cache=draw(st.booleans()),
        cluster=draw(st.sampled_from([0, 0, 1, 2])),
        slo=draw(st.sampled_from([None, None, 20.0])),
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    options=engines(),
    windows=st.sampled_from(WINDOWS),
    pool=st.integers(12, 120),
    trace=st.lists(arrivals, max_size=25),
    delay=st.integers(0, 5),
    most_active=st.integers(1, 3),
    reloads=st.dictionaries(st.integers(0, 50), st.integers(1, 3), max_size=3),
)
def test_pages_are_conserved_and_everyone_ends(options, windows, pool, trace, delay, most_active, reloads):
    sizes = {AdapterVersion(str(n), v): 2 + n for n in (1, 2, 3) for v in range(5)}
    simulation = Simulation(options, pool_layout(windows, PAGE), pool, sizes, delay, most_active)
    current = {n: 0 for n in (1, 2, 3)}
    cancels: list[tuple[int, Sequence]] = []
    submitted: list[Sequence] = []
    for step in range(52):
        if number := reloads.get(step):
            simulation.scheduler.drop_adapter(AdapterVersion(str(number), current[number]))
            current[number] += 1
        for arrival in (a for a in trace if a.step == step):
            for index in range(arrival.copies):
                try:
                    sequence = submit(simulation, arrival, current, index)
                except InputError:
                    continue
                submitted.append(sequence)
                if arrival.cancel is not None:
                    cancels.append((step + arrival.cancel, sequence))
        for at, sequence in cancels:
            if at == step:
                simulation.cancel(sequence)
        simulation.step()
    # Each step moves the oldest sequence on, or an adapter's load: so the work bounds the steps.
    work = sum(s.prompt_length + s.max_tokens + delay + 10 for s in submitted)
    simulation.run(most_steps=8 * work + 10)
    assert all(s.state == "finished" and simulation.jobs[s].reason is not None for s in submitted)
    for sequence in submitted:
        job = simulation.jobs[sequence]
        assert sequence.tokens[sequence.prompt_length :] == job.answer[: sequence.generated]
        if job.reason in ("stop", "length"):
            assert sequence.generated == job.stop_after
    simulation.all_pages_back()


def submit(simulation: Simulation, arrival: Arrival, current: dict[int, int], index: int) -> Sequence:
    adapter = AdapterVersion(str(arrival.adapter), current[arrival.adapter]) if arrival.adapter else None
    return simulation.submit(
        [arrival.family] * arrival.prompt,
        arrival.max_tokens,
        adapter=adapter,
        client=arrival.client,
        stop_after=arrival.stop_after,
        deadline=None if arrival.deadline is None else simulation.now + arrival.deadline,
        prefix_slots=arrival.slots,
        index=index,
    )


@pytest.mark.parametrize("optimistic", [False, True])
def test_a_flood_ends(optimistic):
    options = EngineOptions(page_tokens=PAGE, max_batch=8, chunk=8, optimistic=optimistic)
    simulation = Simulation(options, pool_layout((6, None), PAGE), 40)
    for number in range(60):
        simulation.submit([number] * (1 + number % 23), 1 + number % 40)
    simulation.run(3000)
    simulation.all_pages_back()
    assert (sum(job.preempted for job in simulation.jobs.values()) > 0) == optimistic
