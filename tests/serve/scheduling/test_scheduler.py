"""The scheduler's single decisions: rows, chunks, windows, the pipeline, preemption, refusals."""

import itertools

import pytest
from tests.serve.scheduling.simulation import Simulation, pool_layout

from jora.errors import InputError
from jora.serve.options import EngineOptions
from jora.serve.requests import Rejected
from jora.serve.scheduling.admission import PREFILLING
from jora.serve.scheduling.scheduler import REMEMBERED
from jora.serve.scheduling.sequence import AdapterVersion

PAGE = 4


def simulation(pool=200, windows=(None,), **options):
    base = {"page_tokens": PAGE, "max_batch": 4, "chunk": 8, "prefix_cache": False}
    return Simulation(EngineOptions(**{**base, **options}), pool_layout(windows, PAGE), pool)


def test_the_lowest_free_row_is_taken_and_the_last_token_is_not_computed():
    sim = simulation()
    first, second = sim.submit([1] * 3, 2), sim.submit([2] * 3, 9)
    plan = sim.step()
    assert plan.admitted == [first, second] and (first.slot, second.slot) == (0, 1)
    assert plan.prefill.sequence is first and plan.prefill.last and not plan.decode
    plan = sim.step()  # the first's first token is still unknown, and yet it decodes
    assert plan.decode == [first] and plan.prefill.sequence is second and first.length == 4
    plan = sim.step()  # both of its tokens are dispatched: by counting, no third row
    assert plan.decode == [second] and first.state == "finished" and first.generated == 2
    third = sim.submit([3], 1)
    sim.step()
    assert third.slot == 0
    sim.run(20)


def test_an_end_that_the_host_finds_costs_one_row():
    sim = simulation()
    sequence = sim.submit([1] * 3, 9, stop_after=2)
    sim.run(20)
    assert sum(sequence in plan.decode for plan in sim.plans) == 2
    assert sim.jobs[sequence].reason == "stop"


def test_chunks_fill_blocks_and_alternate_between_the_oldest_and_the_shortest():
    sim = simulation(pool=500)
    long = sim.submit([1] * 801, 1)
    sim.step()
    shorts = [sim.submit([2] * 5, 1) for _ in range(20)]
    served = [sim.step().prefill for _ in range(40)]
    assert all(chunk.count == 8 and chunk.start % 8 == 0 for chunk in served if chunk.sequence is long)
    assert sum(chunk.sequence is long for chunk in served) in (20, 21)
    assert all(short.computed == 5 or short.state == "finished" for short in shorts)
    for _ in range(1000):  # short ones never stop coming, and the long one ends
        if long.state == "finished":
            break
        while sim.scheduler.waiting_count < 5:
            sim.submit([2] * 5, 1)
        sim.step()
    assert long.state == "finished" and sim.steps <= 2 * 101 + 5


def test_few_prompts_are_in_prefill_at_a_time():
    sim = simulation(max_batch=20)
    for _ in range(20):
        sim.submit([1] * 30, 1)
    assert len(sim.step().admitted) == PREFILLING
    sim.run(200)


@pytest.mark.parametrize("cache", [False, True])
def test_sliding_groups_return_their_blocks_in_prefill_and_decode(cache):
    sim = simulation(windows=(6, None), prefix_cache=cache)
    sequence = sim.submit([1] * 64, 40)
    while sequence.state != "finished":
        sim.step()
        if sequence.tables:
            sliding, full = ([page for page in table if page] for table in sequence.tables)
            assert len(full) == -(-sequence.computed // PAGE)
            assert len(sliding) <= 3  # a window of 6 touches at most 3 pages of 4, and a chunk's are back after it
            assert sim.pages.total - 1 - sim.pages.available == len(sliding) + len(full)
    sim.all_pages_back()


def test_admission_counts_what_requests_may_need_and_optimism_what_they_need():
    for optimistic, together in ((False, 1), (True, 3)):
        sim = simulation(pool=21, optimistic=optimistic)
        for _ in range(3):
            sim.submit([1] * 8, 50)
        sim.step()
        assert sim.scheduler.running_count == together
        sim.run(1000)


def test_the_latest_is_preempted_and_computed_again_with_all_that_was_known():
    sim = simulation(pool=21, optimistic=True)
    jobs = [sim.submit([number] * 8, 50) for number in range(3)]
    while not any(plan.preempted for plan in sim.plans):
        sim.step()
    assert sim.plans[-1].preempted == [jobs[2]] and jobs[2].epoch == 1 and jobs[2].slot is None
    known = jobs[2].length
    assert known > 8 and jobs[2].computed == 0
    sim.run(2000)
    assert sim.jobs[jobs[0]].preempted == 0
    again = [p.prefill for p in sim.plans if p.prefill and p.prefill.sequence is jobs[2]]
    assert sum(chunk.count for chunk in again) >= 8 + known
    assert all(s.tokens[8:] == sim.jobs[s].answer for s in jobs)
    assert sim.scheduler.service["default"] == 3 * (8 + 2 * 50)  # recomputing is not the client's doing
    sim.all_pages_back()


def test_what_never_fits_is_refused_and_what_just_fits_runs():
    for optimistic in (False, True):
        sim = simulation(pool=11, optimistic=optimistic)
        with pytest.raises(InputError, match="needs up to 11 pages and the pool has 10"):
            sim.submit([1] * 8, 33)
        sim.submit([1] * 8, 32)
        sim.run(100)


def test_a_full_queue_rejects_with_a_time_that_follows_the_service_rate():
    sim = simulation(max_queue=3, max_batch=1)
    for _ in range(3):
        sim.submit([1], 2)
    with pytest.raises(Rejected, match="full") as unknown:
        sim.submit([1], 2)
    assert unknown.value.retry_after == 1.0
    sim.run(50)
    waits = []
    for tokens in (2, 30):
        for _ in range(20):
            while sim.scheduler.waiting_count < 3:
                sim.submit([1], tokens)
            sim.step() if tokens == 2 else [sim.step() for _ in range(31)]
        with pytest.raises(Rejected) as full:
            while True:
                sim.submit([1], tokens)
        waits.append(full.value.retry_after)
    assert 1.0 <= waits[0] < waits[1] <= 60.0


def test_a_full_queue_has_a_place_for_those_who_have_less_than_their_share():
    sim = simulation(max_queue=12, max_batch=1)
    sim.submit([1], 90)
    sim.step()

    def taken(client):
        for count in itertools.count():
            try:
                sim.submit([1], 2, client=client)
            except Rejected:
                return count

    assert [taken(client) for client in "abca"] == [12, 6, 4, 0]  # a half for the second, a third for the third
    assert [taken(client) for client in "defg"] == [2, 0, 0, 0]  # never more than twice as many
    assert sim.scheduler.waiting_count == 24
    sim.run(1000)


def test_preempted_sequences_count_in_the_queue():
    sim = simulation(pool=21, optimistic=True, max_queue=1)
    sim.submit([1] * 30, 50, client="a")
    sim.step()
    sim.submit([1] * 30, 50, client="b")
    while not sim.plans[-1].preempted:
        sim.step()
    with pytest.raises(Rejected):
        sim.submit([1], 2, client="b")
    sim.submit([1], 2, client="c")
    with pytest.raises(Rejected):
        sim.submit([1], 2, client="d")
    sim.run(1000)


def test_names_of_unloaded_adapters_are_forgotten_in_time():
    sim = simulation()
    for number in range(2 * REMEMBERED):
        sim.scheduler.drop_adapter(AdapterVersion(f"{number}", number))
    assert len(sim.scheduler._dropped) == REMEMBERED


@pytest.mark.parametrize("windows", [(None,), (6, None), (7,)])
def test_the_longest_sequence_is_the_longest_that_is_taken(windows):
    sim = simulation(pool=11, windows=windows)
    longest = sim.scheduler.longest(None, 500)
    assert longest == {(None,): 40, (6, None): 24, (7,): 500}[windows]
    sim.submit([1] * 8, longest - 8)
    if longest < 500:
        with pytest.raises(InputError, match="the pool has 10"):
            sim.submit([1] * 8, longest - 7)
    sim.run(1000)


def test_deadlines_end_requests_in_the_queue_in_prefill_and_in_decode():
    sim = simulation(max_batch=2)
    decoding = sim.submit([1] * 4, 90, deadline=6.0)
    prefilling = sim.submit([1] * 400, 1, deadline=6.0)
    waiting = sim.submit([1] * 4, 1, deadline=6.0)
    for _ in range(6):
        assert not sim.step().expired
    assert (decoding.state, prefilling.state, waiting.state) == ("running", "prefill", "waiting")
    expired = sim.step().expired
    assert {(id(s), reason) for s, reason in expired} == {(id(s), "deadline") for s in (decoding, prefilling, waiting)}
    assert not sim.scheduler.running_count and not sim.scheduler.waiting_count
    sim.all_pages_back()


def test_cancellation_in_every_state():
    sim = simulation(max_batch=2, pool=30, optimistic=True)
    decoding, prefilling, waiting = sim.submit([1] * 4, 50), sim.submit([1] * 60, 1), sim.submit([1] * 4, 1)
    sim.step()
    sim.step()
    assert (decoding.state, prefilling.state, waiting.state) == ("running", "prefill", "waiting")
    for sequence in (waiting, prefilling, decoding, decoding):
        sim.cancel(sequence)
        sim.scheduler.check()
    assert not sim.scheduler.running_count and not sim.scheduler.waiting_count
    sim.all_pages_back()
    jobs = [sim.submit([1] * 30, 50), sim.submit([1] * 30, 50)]
    while not sim.plans[-1].preempted:
        sim.step()
    assert jobs[1].state == "waiting" and sim.scheduler.waiting_count == 1
    sim.cancel(jobs[1])
    assert sim.scheduler.waiting_count == 0
    sim.run(100)
    sim.all_pages_back()


def test_early_abort_drops_who_cannot_make_it_and_serves_the_newest_under_overload():
    sim = simulation(max_batch=1, slo=20.0)
    for step in range(300):
        if step % 4 == 0:
            sim.submit([1] * 4, 10)
        sim.step()
    served = [s for s, job in sim.jobs.items() if job.reason == "length"]
    dropped = [s for s, job in sim.jobs.items() if job.reason == "deadline"]
    assert dropped and all(s.first_token is None and s.order is None for s in dropped)
    assert all(s.first_token - s.arrival <= 20.0 for s in served)
    assert sum(s.first_token - s.arrival < 12 for s in served) > 0.8 * len(served)  # newest first
    assert len(served) >= 300 // 12 - 2  # and no step is lost to it


def test_who_has_begun_is_not_aborted():
    sim = simulation(slo=5.0)
    sequence = sim.submit([1] * 200, 3)
    sim.run(100)
    assert sim.jobs[sequence].reason == "length"


def test_of_the_preempted_the_oldest_comes_back_first():
    sim = simulation(pool=17, optimistic=True, chunk=16)
    _, second, third = (sim.submit([n] * 4, most) for n, most in ((0, 60), (1, 40), (2, 40)))
    while len(sim.scheduler._batch.preempted) < 2:
        sim.step()
    assert sim.scheduler._batch.preempted == [second, third]
    sim.run(1000)


def test_optimism_leaves_everyone_who_runs_a_block():
    sim = simulation(pool=11, optimistic=True)
    sim.submit([1] * 4, 30)
    sim.step()  # its four positions fill its only page: the next token needs another
    sim.submit([2] * 30, 5)  # 8 pages and one: all that is left
    sim.run(200)
    assert not any(job.preempted for job in sim.jobs.values())


def test_optimism_counts_what_prompts_in_prefill_still_need():
    sim = simulation(pool=21, optimistic=True)
    sim.submit([1] * 50, 20)  # 13 pages, two of them after the first step
    sim.step()
    sim.submit([2] * 50, 20)
    sim.run(200)
    assert not any(job.preempted for job in sim.jobs.values())


def test_one_slow_request_does_not_have_everybody_aborted():
    """What is expected of the next is at most half of the limit."""
    sim = simulation(slo=20.0)
    sim.submit([1] * 400, 1)
    sim.run(100)
    later = sim.submit([2] * 4, 1)
    sim.run(20)
    assert sim.jobs[later].reason == "length"


def test_who_could_not_have_its_first_token_in_time_is_aborted_before_the_time_is_up():
    sim = simulation(slo=20.0, max_batch=1)
    sim.submit([1] * 64, 1)  # 8 steps to the first token
    sim.run(30)
    sim.submit([1] * 4, 90)
    sim.step()
    waits, since = sim.submit([2] * 4, 1), sim.now
    while sim.jobs[waits].reason is None:
        sim.step()
    assert sim.jobs[waits].reason == "deadline" and 10 <= sim.now - since < 20


def test_deadlines_far_away_of_ended_requests_are_forgotten():
    sim = simulation()
    for _ in range(400):
        sim.submit([1], 1, deadline=1e9)
        sim.run(10)
    assert len(sim.scheduler._deadlines._heap) < 200
