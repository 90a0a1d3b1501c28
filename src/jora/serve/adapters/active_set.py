"""The active set's host twin: which adapter has which number, ranks and vectors, and what has to be copied.

An adapter stays in the set after its last row has left, until another needs its place: it may be asked for again.
The set's size is the smallest pair of buckets that holds what runs; it grows at once, and shrinks where a smaller
bucket would be half empty, or saves three quarters: a load near an edge does not copy everything back and forth.
Of base products it holds the vectors of each adapter once, and a decode program has as many more rows for all but the
first of each row: so the bucket must do for both.

No device work here: `update` says what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jora.serve.adapters.joining import Place
from jora.serve.adapters.packing import Spec
from jora.serve.scheduling.sequence import AdapterVersion


class Size(NamedTuple):
    """Of an active set: ranks and base products, in all. A decode program is compiled for each that may occur."""

    ranks: int
    products: int


class Member(NamedTuple):
    """An adapter in the set."""

    version: AdapterVersion
    spec: Spec
    place: Place


@dataclass(frozen=True)
class Update:
    """What must be done on the device, in this order. rebuild: begin with a new, empty set of this size."""

    rebuild: Size | None
    leave: tuple[int, ...]
    join: tuple[Member, ...]


class ActiveSet:
    """Numbers 0, 1, ... and ranges for adapters, by first fit. rank_buckets, product_buckets: rising, as in
    `EngineOptions`; 0 is always one of them.
    """

    def __init__(self, rank_buckets: Sequence[int], product_buckets: Sequence[int] = ()) -> None:
        self.rank_buckets = (0, *rank_buckets)
        self.product_buckets = (0, *product_buckets)
        self.size = Size(0, 0)
        self.members: dict[AdapterVersion, Member] = {}

    def sizes(self) -> list[Size]:
        """Every size that may occur."""
        return [Size(ranks, products) for ranks in self.rank_buckets for products in self.product_buckets]

    def fits(self, rows: Iterable[tuple[AdapterVersion, Spec]]) -> bool:
        """Whether the adapters of these rows can run together; one entry a row, base rows left out.

        Ranks and products count once an adapter; extra products (all but the first) once a row.
        """
        rows = list(rows)
        return self._holds(_needs(dict(rows), Counter(version for version, _ in rows)))

    def update(self, wanted: Mapping[AdapterVersion, Spec], rows: Mapping[AdapterVersion, int] | None = None) -> Update:
        """Make room for all of `wanted`, which must fit; others may stay or go. Deterministic.

        rows: how many rows each has; one each where it is None. To be called when one more row comes, too.
        Raises ValueError where they do not fit.
        """
        needs = _needs(wanted, dict.fromkeys(wanted, 1) if rows is None else rows)
        if not self._holds(needs):
            raise ValueError(f"{needs} do not fit {self.sizes()[-1]}")
        size = self._size_for(needs) if wanted else self.size
        if size != self.size:
            return self._rebuild(wanted, size)
        self._drop_idle_soft_prompts(wanted)
        new = [version for version in wanted if version not in self.members]
        left: list[int] = []
        joined: list[Member] = []
        for version in new:
            place = self._place(wanted[version])
            # Those that nobody wants make room one by one, the longest in the set first.
            while place is None and (idle := next((v for v in self.members if v not in wanted), None)) is not None:
                left.append(self.members.pop(idle).place.number)
                place = self._place(wanted[version])
            if place is None:  # room enough, but in pieces
                return self._rebuild(wanted, size)
            joined.append(self._add(version, wanted[version], place))
        return Update(None, tuple(left), tuple(joined))

    def remove(self, version: AdapterVersion) -> int | None:
        """Take an adapter out that no row has; its number, to be passed to `leave`, or None where it was not in."""
        member = self.members.pop(version, None)
        return None if member is None else member.place.number

    def numbers(self, rows: Sequence[AdapterVersion | None]) -> Int[np.ndarray, " b"]:
        """The number of each row's adapter, -1 for the base."""
        found = [-1 if version is None else self.members[version].place.number for version in rows]
        return np.array(found, np.int32)

    def expanded(
        self, rows: Sequence[AdapterVersion | None], extra: int
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " E"]]:
        """(vector [b + extra], row [extra]) of `active.Expanded`: each row's first vector, then the others."""
        vector = [0] * len(rows)
        more: list[int] = []
        row: list[int] = []
        for number, version in enumerate(rows):
            if version is None or not (products := self.members[version].spec.products):
                continue
            vector[number] = first = self.members[version].place.vector
            more += range(first + 1, first + products)
            row += [number] * (products - 1)
        if len(row) > extra:
            raise ValueError(f"{len(row)} extra products do not fit {extra}")
        padding = extra - len(row)
        return np.array(vector + more + [0] * padding, np.int32), np.array(row + [len(rows)] * padding, np.int32)

    def _holds(self, needs: Size) -> bool:
        return needs.ranks <= self.rank_buckets[-1] and needs.products <= self.product_buckets[-1]

    def _size_for(self, needs: Size) -> Size:
        return Size(
            _bucket(self.rank_buckets, self.size.ranks, needs.ranks),
            _bucket(self.product_buckets, self.size.products, needs.products),
        )

    def _rebuild(self, wanted: Mapping[AdapterVersion, Spec], size: Size) -> Update:
        self.size, self.members = size, {}
        joined = []
        for version, spec in wanted.items():
            place = self._place(spec)
            assert place is not None  # first fit into an empty range leaves no holes
            joined.append(self._add(version, spec, place))
        return Update(size, (), tuple(joined))

    def _drop_idle_soft_prompts(self, wanted: Mapping[AdapterVersion, Spec]) -> None:
        """Adapters that take no place would never have to make room for others, and stay for ever."""
        for version, member in list(self.members.items()):
            if version not in wanted and not member.spec.rank and not member.spec.products:
                del self.members[version]

    def _add(self, version: AdapterVersion, spec: Spec, place: Place) -> Member:
        self.members[version] = member = Member(version, spec, place)
        return member

    def _place(self, spec: Spec) -> Place | None:
        """The lowest number and ranges that are free; None where there is no room."""
        members = self.members.values()
        rank = _first_fit([(m.place.rank, m.spec.rank) for m in members], self.size.ranks, spec.rank)
        taken = [(m.place.vector - 1, m.spec.products) for m in members]  # vector 0 is the base's
        vector = _first_fit(taken, self.size.products, spec.products)
        if rank is None or vector is None:
            return None
        numbers = {member.place.number for member in members}
        return Place(next(n for n in range(len(numbers) + 1) if n not in numbers), rank, 1 + vector)


def _needs(wanted: Mapping[AdapterVersion, Spec], rows: Mapping[AdapterVersion, int]) -> Size:
    """What the adapters take with so many rows each."""
    products = sum(spec.products for spec in wanted.values())
    extra = sum(rows[version] * max(spec.products - 1, 0) for version, spec in wanted.items())
    return Size(sum(spec.rank for spec in wanted.values()), max(products, extra))


def _bucket(buckets: Sequence[int], now: int, need: int) -> int:
    """The bucket for `need`: the smallest that holds it. From a larger one, `now`, down to one that would be more than
    half full only where that is a quarter of it or less: the next adapter may need the larger one again.
    """
    smallest = next(bucket for bucket in buckets if bucket >= need)
    small_enough = smallest >= now or 2 * need <= smallest or 4 * smallest <= now
    return smallest if small_enough else _bucket_above(buckets, smallest, now)


def _bucket_above(buckets: Sequence[int], smallest: int, now: int) -> int:
    return min(now, next(bucket for bucket in buckets if bucket > smallest))


def _first_fit(taken: Iterable[tuple[int, int]], total: int, count: int) -> int | None:
    """The lowest start of `count` free places among `total`; `taken` are (start, count) of others."""
    at = 0
    for start, length in sorted(entry for entry in taken if entry[1]):
        if start - at >= count:
            return at
        at = start + length
    return at if total - at >= count else None
