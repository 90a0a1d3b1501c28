"""Who owns which page of the pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Protocol

CACHE: Hashable = ("cache",)  # owner of the prefix cache's pages, used or not
NOBODY = 0  # the page that padded rows write to


class PoolFull(Exception):
    """Fewer pages are free, or can be made free, than were asked for."""


class Reclaimer(Protocol):
    """Holds pages that nothing uses now and gives them back when they are needed."""

    def evictable_pages(self) -> int: ...

    def evict(self, count: int) -> None:
        """Release at least `count` pages; all that it can where those are fewer."""


class Pages:
    """The host's books of a pool of `total` pages. Deterministic; a page taken or given back costs O(1).

    A page has one owner: `("kv", ...)` a sequence, `("adapter", ...)` an adapter, `CACHE` the prefix cache, which
    counts the sequences that share it. Page 0 is never given out.
    """

    def __init__(self, total: int):
        if total < 2:
            raise ValueError(f"a pool needs at least 2 pages, found {total}")
        self.total = total
        self._free = list(range(total - 1, NOBODY, -1))  # a stack: a page just returned goes out next
        self._owners: list[Hashable | None] = [None] * total
        self._counts: Counter[Hashable] = Counter()
        self._reclaimers: list[Reclaimer] = []

    @property
    def free_count(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free ones and those that reclaimers would release."""
        return len(self._free) + sum(r.evictable_pages() for r in self._reclaimers)

    def reclaim_from(self, reclaimer: Reclaimer) -> None:
        """Ask it for pages when too few are free."""
        assert reclaimer not in self._reclaimers, "its pages would be counted twice"
        self._reclaimers.append(reclaimer)

    def make_free(self, count: int) -> bool:
        """Evict until `count` pages are free; False, and nothing is evicted, where that cannot be.

        Who hoards most gives first, so that neither idle adapters nor cached prompts crowd out the other.
        """
        if count > self.available:
            return False
        while (short := count - len(self._free)) > 0:
            before = len(self._free)
            by_hoard = sorted(self._reclaimers, key=lambda r: r.evictable_pages(), reverse=True)
            by_hoard[0].evict(min(short, by_hoard[0].evictable_pages()))
            if len(self._free) == before:
                raise AssertionError(f"{type(by_hoard[0]).__name__} promised pages and released none")
        return True

    def allocate(self, owner: Hashable, count: int) -> list[int]:
        """Take `count` pages. Raises PoolFull, with nothing taken or evicted, where they cannot be had."""
        if not self.make_free(count):
            raise PoolFull(f"{count} pages asked for, {self.available} available of {self.total}")
        if count <= 0:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for page in pages:
            self._owners[page] = owner
        self._counts[owner] += count
        return pages

    def release(self, owner: Hashable, pages: Iterable[int]) -> None:
        """Give pages back. AssertionError where one is not this owner's: the books would be wrong from here on."""
        for page in pages:
            assert self._owners[page] == owner, f"page {page} is {self._owners[page]}'s, not {owner}'s"
            self._owners[page] = None
            self._free.append(page)
            self._uncount(owner)

    def transfer(self, page: int, owner: Hashable, to: Hashable) -> None:
        """Make a page another's."""
        assert self._owners[page] == owner, f"page {page} is {self._owners[page]}'s, not {owner}'s"
        self._owners[page] = to
        self._uncount(owner)
        self._counts[to] += 1

    def owner_of(self, page: int) -> Hashable | None:
        """None: it is free, or page 0."""
        return self._owners[page]

    def owned(self, owner: Hashable) -> int:
        """Pages that this owner holds."""
        return self._counts.get(owner, 0)

    def by_kind(self) -> dict[str, int]:
        """Pages by the first word of their owners ("kv", "adapter", "cache"), and "free"."""
        kinds: Counter[str] = Counter({"kv": 0, "adapter": 0, "cache": 0})
        for owner, count in self._counts.items():
            assert isinstance(owner, tuple)
            kinds[owner[0]] += count
        return {**kinds, "free": self.free_count}

    def check(self) -> None:
        """AssertionError unless free + KV + cached + adapter + 1 = total and no page is anyone's twice. O(total)."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        assert NOBODY not in self._free and self._owners[NOBODY] is None, "page 0 was given out"
        assert all(self._owners[page] is None for page in self._free), "a free page has an owner"
        owned = Counter(owner for owner in self._owners if owner is not None)
        assert owned == self._counts, "the counts by owner are wrong"
        assert len(self._free) + owned.total() + 1 == self.total, (
            f"{len(self._free)} free + {owned.total()} owned + 1 is not {self.total}"
        )

    def _uncount(self, owner: Hashable) -> None:
        self._counts[owner] -= 1
        if not self._counts[owner]:
            del self._counts[owner]
