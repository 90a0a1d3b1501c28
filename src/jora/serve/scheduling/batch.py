"""The sequences that have a row, and those that had to give theirs up."""

from __future__ import annotations

import heapq
from collections import Counter

from jora.serve.pages.allocator import Pages
from jora.serve.scheduling.plan import AdapterResidency
from jora.serve.scheduling.sequence import AdapterVersion, Sequence
from jora.serve.scheduling.tables import PageTables


def admission_order(sequence: Sequence) -> int:
    """Its number among first admissions: the smallest is the oldest."""
    assert sequence.order is not None
    return sequence.order


class Batch:
    """Rows, pages and pinned adapters of the admitted sequences."""

    def __init__(self, rows: int, pages: Pages, tables: PageTables, adapters: AdapterResidency):
        self._pages = pages
        self._tables = tables
        self._adapters = adapters
        self.rows = rows
        self.active: dict[Sequence, None] = {}  # in prefill or decode
        self.prefilling: list[Sequence] = []  # of these
        self.preempted: list[Sequence] = []  # have no row; in order of admission
        self.versions: Counter[AdapterVersion] = Counter()  # adapters of active sequences
        self.free_rows = list(range(rows))  # a heap
        self.departures = 0  # sequences that have left their row
        self._admissions = 0

    def enter(self, sequence: Sequence) -> None:
        """It takes the lowest free row and pins its adapter, which is resident."""
        sequence.slot = heapq.heappop(self.free_rows)
        sequence.state = "prefill"
        if sequence.order is None:
            sequence.order = self._admissions
            self._admissions += 1
        self.active[sequence] = None
        self.prefilling.append(sequence)
        if (version := sequence.adapter) is not None:
            if version not in self.versions:
                self._adapters.pin(version)
            self.versions[version] += 1

    def leave(self, sequence: Sequence) -> None:
        """Its pages, row and adapter are not its any more."""
        assert sequence.slot is not None
        self._tables.drop(sequence)
        del self.active[sequence]
        self.departures += 1
        if sequence.state == "prefill":
            self.prefilling.remove(sequence)
        heapq.heappush(self.free_rows, sequence.slot)
        sequence.slot = None
        if (version := sequence.adapter) is not None:
            self.versions[version] -= 1
            if not self.versions[version]:
                del self.versions[version]
                self._adapters.unpin(version)

    def make_room(self, sequence: Sequence, positions: int) -> list[Sequence]:
        """Give it pages for so many positions. Where they are short the latest admitted is preempted, or it itself if
        it is the latest. Returns the preempted.

        The oldest is never preempted, and alone it fits (`Scheduler.submit`), so somebody always goes on.
        """
        preempted = []
        missing = self._tables.missing(sequence, positions)
        while not self._pages.make_free(missing):
            latest = max(self.active, key=admission_order)
            self._preempt(latest)
            preempted.append(latest)
            if latest is sequence:
                return preempted
        self._tables.grow(sequence, positions)
        return preempted

    def check(self) -> None:
        """AssertionError unless every page, row and pin is accounted for. O(pages)."""
        for sequence in self.active:
            own = {p for table in sequence.tables for p in table if p and self._pages.owner_of(p) == sequence.owner}
            assert len(own) == self._pages.owned(sequence.owner), f"{sequence.owner} has lost a page"
        kv = sum(self._pages.owned(sequence.owner) for sequence in self.active)
        assert kv == self._pages.by_kind()["kv"], "pages belong to a sequence that has none"
        taken = [s.slot for s in self.active if s.slot is not None]
        assert sorted(taken + self.free_rows) == list(range(self.rows)), "a row is lost or taken twice"
        assert self.versions == Counter(s.adapter for s in self.active if s.adapter is not None), "pins are wrong"

    def _preempt(self, sequence: Sequence) -> None:
        self.leave(sequence)
        sequence.state = "waiting"
        sequence.computed = 0
        sequence.epoch += 1
        self.preempted.append(sequence)
        self.preempted.sort(key=admission_order)
