"""The active set's host twin against brute force: nothing overlaps, what fits gets in, and nothing is lost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jora.serve.adapters.active_set import ActiveSet, Size, Update
from jora.serve.adapters.packing import Spec, TargetSpec

RANKS, PRODUCTS = (8, 20, 40), (2, 6)
SPECS = st.tuples(st.integers(0, 12), st.integers(0, 3)).map(lambda n: spec(*n))
TRACES = st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 3), max_size=8), max_size=25)  # name -> rows


def spec(rank: int, products: int = 0) -> Spec:
    return Spec((TargetSpec("q_proj", rank, 0), TargetSpec("up_proj", rank // 2, products)))


class Mirror:
    """What the device would hold: for every rank and vector the adapter last written there, and its owner."""

    def __init__(self) -> None:
        self.size = Size(0, 0)
        self.ranks: list[Any] = []
        self.owner: list[int] = []
        self.vectors: list[Any] = []

    def apply(self, update: Update) -> None:
        if update.rebuild is not None:
            self.size = update.rebuild
            self.ranks, self.owner = [None] * self.size.ranks, [-1] * self.size.ranks
            self.vectors = [None] * (1 + self.size.products)
        for number in update.leave:
            self.owner = [-1 if each == number else each for each in self.owner]
        for version, each, place in update.join:
            assert place.number not in self.owner, "the number is another's"
            for rank in range(place.rank, place.rank + each.rank):
                assert self.owner[rank] == -1, "the rank is another's"
                self.ranks[rank], self.owner[rank] = version, place.number
            assert place.vector >= 1, "entry 0 is the base's"
            for vector in range(place.vector, place.vector + each.products):
                self.vectors[vector] = version


@settings(max_examples=150, deadline=None)
@given(specs=st.lists(SPECS, min_size=10, max_size=10), trace=TRACES)
def test_any_load(specs: list[Spec], trace: list[dict[int, int]]) -> None:
    active, mirror = ActiveSet(RANKS, PRODUCTS), Mirror()
    for names in trace:
        running: list[int] = []
        for name in [name for name, rows in names.items() for _ in range(rows)]:  # admission: what still fits
            rows = [(each, specs[each]) for each in (*running, name)]
            once = dict(rows).values()
            ranks, products = sum(s.rank for s in once), sum(s.products for s in once)
            extra = sum(max(0, s.products - 1) for _, s in rows)
            assert active.fits(rows) == (ranks <= 40 and products <= 6 and extra <= 6)
            if active.fits(rows):
                running.append(name)
        wanted = {name: specs[name] for name in running}
        mirror.apply(active.update(wanted, Counter(running)))
        assert mirror.size == active.size
        vector, row = active.expanded(running, active.size.products)
        for number, name in enumerate(running):
            own = [vector[number], *vector[len(running) :][row == number]] if specs[name].products else []
            assert [mirror.vectors[each] for each in own] == [name] * specs[name].products
        assert all(m.spec.rank or m.spec.products or v in wanted for v, m in active.members.items())
        for name in wanted:
            place = active.members[name].place
            assert mirror.ranks[place.rank : place.rank + specs[name].rank] == [name] * specs[name].rank
            ranks_of = [rank for rank, owner in enumerate(mirror.owner) if owner == place.number]
            assert ranks_of == list(range(place.rank, place.rank + specs[name].rank))
            count = specs[name].products
            assert mirror.vectors[place.vector : place.vector + count] == [name] * count
        numbers = [member.place.number for member in active.members.values()]
        assert len(set(numbers)) == len(numbers)


def test_sizes_follow_the_load_without_going_back_and_forth() -> None:
    active = ActiveSet(RANKS, PRODUCTS)
    assert active.update({"a": spec(6)}).rebuild == Size(8, 0)
    assert active.update({"a": spec(6), "b": spec(6)}).rebuild == Size(20, 0)
    assert active.update({"a": spec(6)}) == Update(None, (), ())  # more than half of the smaller one: as it is
    update = active.update({"c": spec(4)})
    assert update.rebuild == Size(8, 0) and [member.version for member in update.join] == ["c"]
    assert active.update({}) == Update(None, (), ())
    assert active.update({"c": spec(4), "d": spec(0, 1)}).rebuild == Size(8, 2)
    with pytest.raises(ValueError, match="do not fit"):
        active.update({"e": spec(41)})


def test_who_stays_until_its_place_is_needed() -> None:
    active = ActiveSet((20,))
    active.update({"a": spec(8), "b": spec(8)})
    assert active.update({"a": spec(8), "c": spec(4)}).leave == ()  # there is room for it
    assert active.update({"a": spec(8), "b": spec(8)}) == Update(None, (), ())  # still there
    update = active.update({"a": spec(8), "d": spec(12)})
    assert update.leave == (1, 2) and [m.version for m in update.join] == ["d"]
    assert active.remove("a") == 0 and active.remove("a") is None


def test_pieces_are_put_together() -> None:
    active = ActiveSet((20,))
    active.update({"a": spec(5), "b": spec(5), "c": spec(5), "d": spec(5)})
    update = active.update({"b": spec(5), "d": spec(5), "e": spec(10)})
    assert update.rebuild == Size(20, 0) and [m.version for m in update.join] == ["b", "d", "e"]


def test_rows_and_their_products() -> None:
    active = ActiveSet((8,), (6,))
    active.update({"ia3": spec(0, 1), "lora": spec(4), "flora": spec(0, 3)})
    rows = ["flora", None, "ia3", "lora", "flora"]
    np.testing.assert_array_equal(active.numbers(rows), [2, -1, 0, 1, 2])
    vector, row = active.expanded(rows, 6)
    np.testing.assert_array_equal(vector, [2, 0, 1, 0, 2, 3, 4, 3, 4, 0, 0])
    np.testing.assert_array_equal(row, [0, 0, 4, 4, 5, 5])
    with pytest.raises(ValueError, match="4 extra products do not fit 3"):
        active.expanded(rows, 3)
    assert active.fits([("flora", spec(0, 3))] * 3) and not active.fits([("flora", spec(0, 3))] * 4)


def test_one_more_row_of_an_adapter_that_is_there_takes_the_next_bucket() -> None:
    active, flora = ActiveSet((8,), (8, 32)), {"flora": spec(0, 4)}
    assert active.fits([*flora.items()] * 4)
    assert active.update(flora, {"flora": 2}).rebuild == Size(0, 8)  # four products, and six more of the rows
    assert active.update(flora, {"flora": 2}) == Update(None, (), ())
    assert active.update(flora, {"flora": 4}).rebuild == Size(0, 32)
    assert (active.expanded(["flora"] * 4, active.size.products)[1] < 4).sum() == 12
    assert active.update(flora, {"flora": 1}).rebuild == Size(0, 8)


def test_soft_prompts_leave_when_nobody_has_them() -> None:
    """They take no place, so no other would ever make them go."""
    active = ActiveSet((8,))
    for number in range(2000):
        active.update({"lora": spec(4), number: Spec()})
    assert set(active.members) == {"lora", 1999}


def test_it_shrinks_past_half_where_three_quarters_are_saved() -> None:
    active = ActiveSet(RANKS, PRODUCTS)
    assert active.update({"a": spec(40)}).rebuild == Size(40, 0)
    assert active.update({"b": spec(6)}).rebuild == Size(8, 0)
