"""The books of the pool, against a plain set."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jora.serve.pages.allocator import CACHE, Pages, PoolFull


class Hoard:
    """A reclaimer that gives up its pages one by one."""

    def __init__(self, pages, owner):
        self.pages, self.owner, self.held = pages, owner, []
        pages.reclaim_from(self)

    def take(self, count):
        self.held += self.pages.allocate(self.owner, count)

    def evictable_pages(self):
        return len(self.held)

    def evict(self, count):
        self.pages.release(self.owner, [self.held.pop(0) for _ in range(count)])


@settings(max_examples=60, deadline=None)
@given(total=st.integers(2, 40), moves=st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 9))))
def test_against_a_set(total, moves):
    pages, held = Pages(total), {owner: [] for owner in range(4)}
    free = set(range(1, total))
    for take, number, count in moves:
        owner = ("kv", number)
        if take and count > len(free):
            with pytest.raises(PoolFull):
                pages.allocate(owner, count)
        elif take:
            got = pages.allocate(owner, count)
            assert len(got) == count and set(got) <= free
            free -= set(got)
            held[number] += got
            assert all(pages.owner_of(page) == owner for page in got)
        else:
            back, held[number] = held[number][:count], held[number][count:]
            pages.release(owner, back)
            free |= set(back)
        pages.check()
        assert pages.free_count == len(free)
        assert pages.owned(owner) == len(held[number])
    assert pages.by_kind() == {"kv": sum(map(len, held.values())), "adapter": 0, "cache": 0, "free": len(free)}


def test_the_same_calls_give_the_same_pages():
    def run():
        pages = Pages(20)
        first = pages.allocate(("kv", 0), 5)
        pages.release(("kv", 0), first[1:3])
        return first, pages.allocate(("kv", 1), 4)

    assert run() == run()


def test_only_the_owner_gives_back():
    pages = Pages(4)
    (page,) = pages.allocate(("kv", 0), 1)
    with pytest.raises(AssertionError, match="not"):
        pages.release(("kv", 1), [page])
    pages.transfer(page, ("kv", 0), CACHE)
    with pytest.raises(AssertionError, match="not"):
        pages.release(("kv", 0), [page])
    pages.release(CACHE, [page])
    with pytest.raises(AssertionError):
        pages.release(CACHE, [page])


def test_the_check_sees_a_lost_page():
    pages = Pages(4)
    pages._free.pop()
    with pytest.raises(AssertionError, match="is not 4"):
        pages.check()


def test_idle_pages_are_reclaimed_from_the_larger_hoard():
    pages = Pages(21)
    small, large = Hoard(pages, ("adapter", "a")), Hoard(pages, CACHE)
    small.take(5)
    large.take(12)
    assert (pages.free_count, pages.available) == (3, 20)
    pages.allocate(("kv", 0), 6)
    assert (len(small.held), len(large.held)) == (5, 9)
    with pytest.raises(PoolFull, match="15 pages asked for, 14 available of 21"):
        pages.allocate(("kv", 0), 15)
    assert (len(small.held), len(large.held)) == (5, 9)  # nothing was evicted in vain
    pages.allocate(("kv", 0), 14)
    assert pages.free_count == pages.available == 0
    pages.check()


def test_a_page_costs_the_same_in_a_large_pool():
    def seconds(total):
        pages = Pages(total)
        start = time.perf_counter()
        for _ in range(2000):
            pages.release(("kv", 0), pages.allocate(("kv", 0), 8))
        return time.perf_counter() - start

    seconds(100)
    assert min(seconds(1_000_000) for _ in range(3)) < 20 * min(seconds(100) for _ in range(3))
