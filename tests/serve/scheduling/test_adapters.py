"""Adapters and shared prompts as the scheduler sees them."""

import pytest
from tests.serve.scheduling.simulation import Simulation, pool_layout

from jora.serve.options import EngineOptions
from jora.serve.scheduling.admission import LOOKED_AT, PREFETCHED
from jora.serve.scheduling.sequence import AdapterVersion

PAGE = 4
A, B, C = (AdapterVersion(name, 0) for name in "abc")


def simulation(pool=200, windows=(None,), sizes=None, delay=0, most_active=9, **options):
    base = {"page_tokens": PAGE, "max_batch": 4, "chunk": 8}
    return Simulation(
        EngineOptions(**{**base, **options}), pool_layout(windows, PAGE), pool, sizes or {}, delay, most_active
    )


def test_a_request_waits_for_its_own_adapter_and_keeps_its_place():
    sim = simulation(sizes={A: 5}, delay=6, max_batch=1)
    waits, later = sim.submit([1], 2, adapter=A), [sim.submit([n], 2) for n in range(6)]
    sim.step()
    assert waits.state == "loading" and later[0].slot == 0
    sim.run(100)
    assert sim.adapters.requested == [A]
    before = [s for s in later if s.order < waits.order]
    assert 0 < len(before) < 6 and waits.order == len(before)  # first in its turn once it was loaded


@pytest.mark.parametrize("scheduler", ["vtc", "fcfs"])
def test_however_many_wait_for_adapters_others_go_on(scheduler):
    cold = [AdapterVersion(str(n), 0) for n in range(3 * LOOKED_AT)]
    sim = simulation(sizes=dict.fromkeys(cold, 1), delay=10**6, scheduler=scheduler, max_queue=10**4)
    waiting = [sim.submit([1], 1, adapter=version, client="a") for version in cold]
    sim.adapters.on_host.add(cold[-1])
    base = sim.submit([1], 2, client="b")
    for _ in range(8):  # by first come, first served, each round looks some hundred sequences further
        sim.step()
    assert sim.jobs[base].reason == sim.jobs[waiting[-1]].reason == "length"
    assert sim.scheduler.waiting_count == len(cold) - 1 and waiting[0].state == "loading"
    # No matter how many wait, a round asks after few of them; and after all in time.
    asked, status = [], sim.adapters.status
    sim.adapters.status = lambda version: asked.append(version) or status(version)
    sim.step()
    assert 0 < len(asked) <= LOOKED_AT + 2 * PREFETCHED
    for number in (5, 400):
        sim.adapters.loading[cold[number]] = 0
    for _ in range(8):
        sim.step()
    assert sim.jobs[waiting[5]].reason == sim.jobs[waiting[400]].reason == "length"
    sim.cancel(waiting[7])
    assert sim.scheduler.waiting_count == len(cold) - 4


def test_who_was_set_aside_has_its_place_again():
    cold = [AdapterVersion(str(n), 0) for n in range(20)]
    sim = simulation(sizes=dict.fromkeys(cold, 1), delay=6, max_batch=1)
    aside = [sim.submit([1], 1, adapter=version) for version in cold]
    later = [sim.submit([n], 2) for n in range(20)]
    sim.run(200)
    assert [s.order for s in aside] == sorted(s.order for s in aside)
    assert 0 < aside[0].order < aside[-1].order < later[-1].order


def test_a_client_keeps_its_counter_while_its_adapter_is_loaded():
    sim = simulation(sizes={A: 5}, delay=30, max_batch=1)
    cold = sim.submit([1] * 8, 1, adapter=A, client="cold")
    for _ in range(20):
        sim.submit([1] * 8, 2, client="busy")
    for _ in range(20):
        sim.step()
    late = sim.submit([1] * 8, 1, client="late")
    assert sim.scheduler.counters["cold"] == sim.scheduler.counters["late"] == 0 < sim.scheduler.counters["busy"]
    sim.run(200)
    assert late.order < cold.order < 20


def test_who_waits_for_its_soft_prompt_goes_when_it_is_made():
    sim = simulation(sizes={A: 5}, max_batch=1)
    first, second = (sim.submit([n], 1, adapter=A, prefix_slots=3) for n in range(2))
    first.ready = second.ready = False
    later = sim.submit([1], 9)
    for _ in range(4):
        sim.step()
    assert (first.state, second.state, later.state) == ("loading", "loading", "running")
    second.ready = first.ready = True
    sim.run(50)
    assert later.order < first.order < second.order


def test_adapters_of_the_next_requests_are_loaded_early():
    versions = [AdapterVersion(str(n), 0) for n in range(2 * PREFETCHED)]
    sim = simulation(sizes=dict.fromkeys(versions, 2), delay=3, max_batch=1, scheduler="fcfs")
    sim.submit([1], 50)
    for version in versions:
        sim.submit([1], 1, adapter=version)
    sim.step()
    sim.step()
    assert sim.adapters.requested == versions[:PREFETCHED]
    sim.run(300)


def test_idle_adapters_make_room_for_tokens_and_used_ones_stay():
    sim = simulation(pool=21, sizes={A: 8, B: 8}, prefix_cache=False)
    for version in (A, B):
        sim.submit([1], 1, adapter=version)
    sim.run(20)
    assert set(sim.adapters.resident) == {A, B}
    sim.submit([1] * 8, 40, adapter=B)  # 12 pages for tokens: only with A gone
    sim.step()
    assert sim.scheduler.running_count == 1
    sim.run(100)
    assert set(sim.adapters.resident) == {B}


def test_cached_prompts_make_room_for_an_adapter():
    sim = simulation(pool=21, sizes={A: 18})
    sim.submit(range(60), 1)
    sim.run(30)
    assert sim.pages.by_kind()["cache"] == 15
    sim.submit([1], 1, adapter=A)
    sim.run(20)
    assert sim.pages.by_kind()["cache"] <= 2 and A in sim.adapters.resident


def test_the_active_set_limits_how_many_adapters_run():
    sim = simulation(sizes={A: 2, B: 2}, most_active=1)
    first, second, third = (sim.submit([1], 5, adapter=v) for v in (A, B, A))
    sim.step()
    sim.step()
    assert first.slot is not None and second.slot is None and third.slot is None  # nobody overtakes: B's turn comes
    sim.run(50)
    assert first.order < second.order < third.order


def test_clustering_prefers_running_adapters_within_a_client_and_starves_nobody():
    versions = [A, B, C]
    sim = simulation(sizes=dict.fromkeys(versions, 2), cluster=1, max_batch=2, scheduler="fcfs")
    first, other = sim.submit([1], 9, adapter=A), sim.submit([1], 1, adapter=B)
    same = [sim.submit([1], 9, adapter=A) for _ in range(10)]
    sim.run(300)
    assert first.order == 0
    assert [s.order for s in same[:2]] == [1, 2] and other.order == 3  # overtaken max_batch times, then it goes


def test_clustering_stays_within_the_fairness_order():
    sim = simulation(sizes={A: 2, B: 2}, cluster=1, max_batch=1)
    for _ in range(6):
        sim.submit([1] * 8, 9, adapter=A, client="greedy")
    sim.step()
    fair = sim.submit([1], 1, adapter=B, client="modest")
    sim.run(200)
    assert fair.order == 1


@pytest.mark.parametrize("windows", [(None,), (6, None)])
def test_answers_of_one_request_compute_its_prompt_once(windows):
    sim = simulation(windows=windows)
    answers = [sim.submit(range(41), 6, index=index) for index in range(4)]
    sim.run(200)
    assert [s.cached for s in answers] == [0, 40, 40, 40]
    assert sum(plan.prefill.count for plan in sim.plans if plan.prefill) == 41 + 3
    assert [s.order for s in answers] == sorted(s.order for s in answers)


def test_others_go_on_while_a_shared_prompt_is_computed():
    sim = simulation()
    first, same = sim.submit(range(60), 1), sim.submit([*range(30), 99], 1)
    different = sim.submit([7] * 20, 1)
    sim.step()
    assert first.slot is not None and same.slot is None and different.slot is not None
    sim.run(100)
    assert same.cached == 28 and different.cached == 0
    # It waited for the blocks that it shares, not for the whole prompt.
    assert next(i for i, p in enumerate(sim.plans) if same in p.admitted) < next(
        i for i, p in enumerate(sim.plans) if p.prefill and p.prefill.sequence is first and p.prefill.last
    )


def test_an_answer_is_found_again_by_the_next_turn_of_a_conversation():
    for windows in ((None,), (6, None)):
        sim = simulation(windows=windows)
        first = sim.submit(range(10), 30)
        sim.run(100)
        second = sim.submit([*first.tokens, 5, 5, 5], 2)
        sim.run(100)
        assert second.cached == 36  # 39 of 40 tokens have keys and values: 9 full blocks


def test_a_new_version_does_not_hit_the_old_ones_blocks():
    new = AdapterVersion("a", 1)
    sim = simulation(sizes={A: 3, new: 3})
    sim.submit(range(40), 1, adapter=A)
    sim.run(30)
    running = sim.submit([*range(40), 1], 30, adapter=A)
    for _ in range(4):
        sim.step()
    assert running.cached == 40
    sim.scheduler.drop_adapter(A)
    sim.scheduler.check()
    assert sim.pages.by_kind()["cache"] == 10  # those that a sequence uses
    after, base = sim.submit(range(40), 1, adapter=new), sim.submit(range(40), 1)
    late = sim.submit(range(40), 1, adapter=A)  # was resolved before the reload
    sim.run(100)
    assert running.state == "finished" and after.cached == base.cached == 0
    assert late.state == "finished" and sim.pages.by_kind()["cache"] == 20


def test_a_dropped_adapters_requests_put_nothing_into_the_cache():
    sim = simulation(sizes={A: 3})
    queued = [sim.submit([n] * 20, 5, adapter=A) for n in range(6)]
    sim.step()
    sim.scheduler.drop_adapter(A)
    sim.run(100)
    assert all(sim.jobs[s].reason == "length" for s in queued)
    assert sim.pages.by_kind()["cache"] == 0


def test_soft_prompts_and_prompt_logprobs():
    sim = simulation(sizes={A: 3})
    sim.submit(range(20), 1, adapter=A, prefix_slots=6)
    sim.run(20)
    again = sim.submit(range(20), 1, adapter=A, prefix_slots=6)
    without = sim.submit(range(20), 1, adapter=A)
    sim.run(20)
    assert again.cached == 24 - 6 and without.cached == 0
    logged = sim.submit(range(20), 1, adapter=A, prefix_slots=6, prompt_logprobs=0)
    sim.run(20)
    assert logged.cached == 0


@pytest.mark.parametrize("optimistic", [False, True])
def test_a_shared_prompt_counts_once_in_admission(optimistic):
    sim = simulation(pool=40, optimistic=optimistic)
    for _ in range(4):  # 26 pages of prompt and one or two each: together only if the prompt is one
        sim.submit(range(105), 4)
    together = 0
    while sim.scheduler.waiting_count or sim.scheduler.running_count:
        sim.step()
        together = max(together, sim.scheduler.running_count)
    assert together >= 3
    assert not any(job.preempted for job in sim.jobs.values())


def test_pages_of_adapters_that_run_count_in_admission():
    sim = simulation(pool=21, sizes={A: 8}, prefix_cache=False)
    sim.submit([1] * 4, 40, adapter=A)
    for _ in range(4):
        sim.step()
    sim.submit([2] * 4, 25)  # 11 + 8 + 7 pages
    sim.step()
    assert sim.scheduler.running_count == 1
    sim.run(200)


def test_of_a_cached_prompt_the_end_goes_before_its_root():
    sim = simulation(pool=21)
    sim.submit(range(40), 1)
    sim.run(30)
    sim.submit([99] * 56, 1)  # takes four of its ten blocks
    sim.run(30)
    again = sim.submit(range(40), 1)
    sim.run(30)
    assert again.cached >= 20
