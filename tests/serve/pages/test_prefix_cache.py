"""Which blocks a prompt may take from the cache, against a brute-force search over what was published."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.scheduling.simulation import pool_layout

from jora.serve.pages.allocator import CACHE, Pages
from jora.serve.pages.prefix_cache import PrefixCache, extend_keys, root_key

P = 4
VERSION = ("a", 0)


class User:
    """Who uses pages: a sequence's side of the cache."""

    def __init__(self, number=0):
        self.owner, self.shared = ("kv", number), 0


def keys_of(tokens, adapter=VERSION, slots=0, salt=b""):
    keys = []
    extend_keys(keys, root_key(adapter, slots, salt), slots, tokens, P)
    return keys


def published(windows, tokens, pages=64):
    """A cache with every block of these tokens, used by nobody."""
    layout, pool = pool_layout(windows, P), Pages(pages)
    cache = PrefixCache(layout, pool)
    publisher = User()
    for key in keys_of(tokens):
        for group in range(len(windows)):
            (page,) = pool.allocate(("kv", 0), 1)
            cache.publish(VERSION, key, group, page, publisher)
            cache.release(page, publisher)
    return layout, pool, cache


@pytest.mark.parametrize("slots", [0, 1, 5])
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4))
def test_keys_do_not_depend_on_how_they_were_extended(slots, cuts):
    tokens = list(range(100, 130))
    keys = []
    for cut in sorted(cuts):
        extend_keys(keys, root_key(VERSION, slots, b""), slots, tokens[:cut], P)
    extend_keys(keys, root_key(VERSION, slots, b""), slots, tokens, P)
    assert keys == keys_of(tokens, slots=slots)
    assert len(keys) == (slots + 30) // P == len(set(keys))


def test_keys_say_everything_that_came_before():
    tokens = list(range(12))
    keys = keys_of(tokens)
    assert keys_of([0, 1, 2, 3, 9, 5, 6, 7, *range(8, 12)])[0] == keys[0]
    assert not set(keys_of([0, 1, 2, 3, 9, 5, 6, 7, *range(8, 12)])[1:]) & set(keys)
    for other in (
        keys_of(tokens, adapter=("a", 1)),
        keys_of(tokens, adapter=("b", 0)),
        keys_of(tokens, adapter=None),
        keys_of(tokens, slots=4),
        keys_of(tokens, salt=b"instance"),
        keys_of([2**31 + 1, *tokens[1:]]),
    ):
        assert not set(other) & set(keys)


@settings(max_examples=150, deadline=None)
@given(
    windows=st.sampled_from([(None,), (6, None), (3, 9, None), (7,), (1, None)]),
    length=st.integers(1, 41),
    evicted=st.integers(0, 30),
    order=st.randoms(use_true_random=False),
)
def test_a_hit_has_all_that_later_positions_see(windows, length, evicted, order):
    tokens = list(range(40))
    _, pool, cache = published(windows, tokens)
    idle = list(cache._idle)
    order.shuffle(idle)
    for page in idle:  # the eviction order of any use
        cache._idle.move_to_end(page)
    cache.evict(evicted)
    cache.check([])
    keys = keys_of(tokens)

    def usable(blocks):
        position = blocks * P
        seen = {
            (group, block)
            for group, window in enumerate(windows)
            for block in range(blocks)
            if window is None or (block + 1) * P > position - window + 1
        }
        held = {(g, b) for b, key in enumerate(keys) if key in cache._blocks for g in range(len(windows))
                if cache._blocks[key].pages[g]}  # fmt: skip
        return position < length and seen <= held

    expected = max(blocks for blocks in range(11) if blocks == 0 or usable(blocks))
    blocks = cache.match(keys_of(tokens[:length]), length)
    assert blocks == expected
    user = User()
    tables = cache.acquire(keys, blocks, user)
    assert [len(table) for table in tables] == [blocks] * len(windows)
    used = [page for table in tables for page in table if page]
    cache.check((user, page) for page in used)
    assert pool.available == 63 - len(used)


def test_at_least_one_token_is_computed():
    _, _, cache = published((None,), list(range(8)))
    assert cache.match(keys_of(list(range(8))), 8) == 1
    assert cache.match(keys_of(list(range(9))), 9) == 2


def test_the_least_recently_used_goes_first_and_used_pages_never():
    _, pool, cache = published((None,), list(range(40)))
    keys = keys_of(list(range(40)))
    user = User()
    used = [page for table in cache.acquire(keys, 3, user) for page in table]
    cache.evict(5)
    assert [key in cache._blocks for key in keys] == [True] * 3 + [False] * 5 + [True] * 2
    cache.evict(99)
    assert cache.evictable_pages() == 0 and pool.owned(CACHE) == 3
    for page in reversed(used):
        cache.release(page, user)
    cache.evict(1)  # the end of the chain before its root
    assert [key in cache._blocks for key in keys[:3]] == [True, True, False]
    pool.check()


def test_a_dropped_version_is_gone_at_once_but_for_pages_in_use():
    _, pool, cache = published((None, 6), list(range(40)))
    keys = keys_of(list(range(40)))
    other, user, other_user = keys_of(list(range(4)), adapter=("a", 1))[0], User(2), User(1)
    (page,) = pool.allocate(("kv", 1), 1)
    cache.publish(("a", 1), other, 0, page, other_user)
    used = [page for table in cache.acquire(keys, 2, user) for page in table if page]
    cache.drop(VERSION)
    cache.check([*((user, each) for each in used), (other_user, page)])
    assert pool.owned(CACHE) == len(used) + 1
    assert cache.match(keys, 41) == 0
    assert cache.match([other], 5) == 0  # its sliding group was never published
    for each in used:
        cache.release(each, user)
    assert pool.owned(CACHE) == 1 and VERSION not in cache._versions
    cache.drop(VERSION)
    cache.check([(other_user, page)])


def test_two_who_computed_the_same_block_keep_one():
    _, pool, cache = published((None,), list(range(4)))
    (page,) = pool.allocate(("kv", 1), 1)
    cache.publish(VERSION, keys_of(list(range(4)))[0], 0, page, User(1))
    assert pool.owner_of(page) == ("kv", 1) and not cache.holds(page)
    assert pool.owned(CACHE) == 1


def test_shared_pages_of_full_groups_are_counted_with_each_user():
    _, _, cache = published((None, 6), list(range(40)))
    keys = keys_of(list(range(40)))
    users = [User(n) for n in range(3)]
    tables = [cache.acquire(keys, blocks, user) for blocks, user in zip((6, 4, 2), users, strict=True)]
    assert [user.shared for user in users] == [4, 4, 2] and cache.shared_pages == 4
    for page in tables[1][0]:
        cache.release(page, users[1])
    assert [user.shared for user in users] == [2, 0, 2] and cache.shared_pages == 2
    for page in tables[0][0]:
        cache.release(page, users[0])
    assert [user.shared for user in users] == [0, 0, 0] and cache.shared_pages == 0
