"""Virtual token counters (arXiv 2401.00588): the bounds of the paper, and what they cost."""

import itertools
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serve.scheduling.simulation import Simulation, pool_layout

from jora.serve.options import EngineOptions
from jora.serve.requests import Request
from jora.serve.scheduling import fairness
from jora.serve.scheduling.fairness import FairQueue
from jora.serve.scheduling.sequence import Sequence

PAGE, POOL, ROWS, LONGEST = 4, 40, 6, 24


def simulation(scheduler="vtc", **options):
    """An engine with the options off that the bounds do not hold with."""
    base = {"page_tokens": PAGE, "max_batch": ROWS, "chunk": 16, "prefix_cache": False, "scheduler": scheduler}
    return Simulation(EngineOptions(**{**base, **options}), pool_layout((None,), PAGE), POOL)


# M, the tokens that the running batch holds: those of the pool, and the last one of each row, which has no KV.
BOUND = max(LONGEST, 2 * ((POOL - 1) * PAGE + ROWS))


def waiting(sim):
    return {s.client for s in sim.scheduler._queue}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    trace=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from("aaaabc"), st.integers(1, LONGEST), st.integers(1, 40)),
        min_size=5,
        max_size=60,
    ),
    stops=st.randoms(use_true_random=False),
)
def test_counters_of_waiting_clients_stay_within_u(trace, stops):
    sim = simulation()
    for step in itertools.count():
        for at, client, prompt, most in trace:
            if at == step:
                sim.submit([1] * prompt, most, client=client, stop_after=stops.randint(1, most))
        sim.step()
        counters = [sim.scheduler.counters[c] for c in waiting(sim)]
        assert not counters or max(counters) - min(counters) <= BOUND
        if step > 60 and not sim.scheduler.waiting_count:
            break
    sim.run(1000)
    computed = {c: sum(s.prompt_length + 2 * s.generated for s in sim.jobs if s.client == c) for c in "abc"}
    assert sim.scheduler.service == {c: w for c, w in computed.items() if w}


def two_backlogged(sim, seed, steps):
    """Client a asks for long answers and often, b for short ones: service of a over b after each step."""
    choose, difference = random.Random(seed), []
    for _ in range(steps):
        for client, prompt, most, depth in (("a", LONGEST, 40, 12), ("b", 2, 5, 8)):
            while sum(s.client == client for s in sim.scheduler._queue) < depth:
                sim.submit([1] * choose.randint(1, prompt), choose.randint(1, most), client=client)
        sim.step()
        difference.append(sim.scheduler.service.get("a", 0) - sim.scheduler.service.get("b", 0))
    return difference


@pytest.mark.parametrize("seed", range(3))
def test_service_of_two_backlogged_clients_differs_by_2u_at_most(seed):
    over = two_backlogged(simulation(), seed, 800)
    assert max(over) - min(over) <= 2 * BOUND
    unfair = two_backlogged(simulation("fcfs"), seed, 800)
    assert max(unfair) - min(unfair) > 4 * BOUND


def test_service_follows_weights():
    sim = simulation(weights={"b": 3.0})
    two_backlogged(sim, 0, 1500)
    service = sim.scheduler.service
    assert service["b"] / service["a"] == pytest.approx(3.0, rel=0.15)


def test_an_idle_client_banks_nothing():
    sim = simulation()
    for _ in range(40):
        sim.submit([1] * 8, 30, client="busy")
    for _ in range(150):
        sim.step()
    before = sim.scheduler.counters["busy"]
    late = [sim.submit([1] * 8, 30, client="late") for _ in range(30)]
    assert sim.scheduler.counters["late"] == before > BOUND
    for _ in range(100):
        sim.step()
    gained = {c: sim.scheduler.counters[c] - before for c in ("busy", "late")}
    assert waiting(sim) == {"busy", "late"} and late[0].state == "finished"
    assert abs(gained["busy"] - gained["late"]) <= BOUND


def queued(client, prompt=10):
    return Sequence(Request("r", (1,) * prompt, client=client), 0, None, 5)


def test_a_client_that_comes_when_nobody_waits_is_lifted_to_the_last_that_left():
    queue = FairQueue(True, {})
    first = queued("a", 100)
    queue.push(first)
    queue.remove(first)
    queue.charge_input(first)
    queue.charge_output(first)
    queue.push(queued("b"))
    assert queue.counters == {"a": 102.0, "b": 102.0}
    # The lift never takes away: a client above the floor keeps its counter.
    queue.charge_output(first)
    queue.push(queued("a"))
    assert queue.counters == {"a": 104.0, "b": 102.0}


def test_the_smallest_counter_goes_first_and_ties_by_arrival():
    queue = FairQueue(True, {"c": 2.0})
    heads = {name: queued(name) for name in "bac"}
    for head in heads.values():
        queue.push(head)
    for name in "bac":
        queue.charge_input(heads[name])
    order = [queue.smallest() for _ in range(3)]
    assert order == ["c", "b", "a"] and queue.smallest() is None
    for name in order:
        queue.restore(name)
    queue.remove(heads["c"])
    assert queue.smallest() == "b" and len(queue) == 2


def test_first_come_first_served_knows_no_clients():
    sim = simulation("fcfs", max_batch=1)
    order = [sim.submit([1], 3, client=client) for client in "aaab"]
    sim.run(100)
    assert [s.admitted for s in order] == sorted(s.admitted for s in order)
    assert sim.scheduler.service == {"a": 21.0, "b": 7.0}


def test_cached_prompt_tokens_are_not_charged():
    sim = simulation(prefix_cache=True)
    sim.submit(range(10), 1, client="a")
    sim.run(10)
    second = sim.submit(range(10), 1, client="b")
    sim.run(10)
    assert second.cached == 8
    assert sim.scheduler.service == {"a": 12.0, "b": 4.0}


@pytest.mark.parametrize("seed", range(3))
def test_throughput_is_that_of_first_come_first_served(seed):
    def steps(scheduler):
        choose, sim = random.Random(seed), simulation(scheduler)
        for _ in range(300):
            client = choose.choice("aaaaabbc")
            sim.submit([1] * choose.randint(1, LONGEST), choose.randint(1, 40), client=client)
        sim.run(20_000)
        return sim.steps

    assert steps("vtc") <= 1.02 * steps("fcfs")


@pytest.mark.parametrize("scheduler", ["vtc", "fcfs"])
def test_no_row_is_idle_while_somebody_fits(scheduler):
    choose, sim = random.Random(0), simulation(scheduler)
    for _ in range(120):
        sim.submit([1] * choose.randint(1, LONGEST), choose.randint(1, 40), client=choose.choice("abc"))
    batch, admission, queue = sim.scheduler._batch, sim.scheduler._admission, sim.scheduler._queue
    blocked = 0

    def nobody_fits(plan):
        nonlocal blocked
        if plan.prefill is None and batch.free_rows and queue:
            name = queue.smallest()
            queue.restore(name)
            assert not admission._fits(next(queue.waiting_of(name)), 0), "it fitted and was not admitted"
            blocked += 1

    sim._check = nobody_fits  # between a plan and its dispatch
    sim.run(2000)
    assert blocked > 10


def test_idle_clients_are_forgotten(monkeypatch):
    monkeypatch.setattr(fairness, "REMEMBERED", 10)
    sim = simulation()
    for number in range(100):
        sim.submit([1], 1, client=str(number))
        sim.run(10)
    assert len(sim.scheduler.counters) <= 13 and len(sim.scheduler.service) <= 13
