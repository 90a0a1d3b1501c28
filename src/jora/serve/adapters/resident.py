"""Which adapters have pages in the pool: the scheduler's `AdapterResidency`, for the engine's thread alone.

Only bookkeeping happens here. What has to be written into the pool is handed to the engine (`take_copies`), which
does it before the step that reads it.

A version that was unloaded or replaced (`retire`) stays as long as something uses it: a running sequence (`pin`) or
an accepted request (`hold`). Then its pages, its host memory and its place in the active set are freed. Its cached
prefixes go at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from typing import NamedTuple

from jora.serve.adapters.active_set import ActiveSet
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.host_store import HostStore
from jora.serve.adapters.loading import Blocks, Loaded, Loader
from jora.serve.adapters.packing import Spec
from jora.serve.pages.allocator import Pages
from jora.serve.scheduling.plan import Residency
from jora.serve.scheduling.sequence import AdapterVersion


class PendingCopy(NamedTuple):
    """Blocks to write into pages of the pool, before anything reads them."""

    version: AdapterVersion
    pages: list[int]
    blocks: Blocks


class _Resident(NamedTuple):
    pages: list[int]
    loaded: Loaded  # without its blocks


class Resident:
    """Residency of a catalogue's adapters. on_retired: told of a version that no later request will have. on_freed:
    then told of it when nothing uses it any more.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        loader: Loader,
        host: HostStore,
        pages: Pages,
        active: ActiveSet,
        on_retired: Callable[[AdapterVersion], None] = lambda version: None,
        on_freed: Callable[[AdapterVersion], None] = lambda version: None,
    ):
        self._catalogue, self._loader, self._host = catalogue, loader, host
        self._pages, self._active, self._on_retired, self._on_freed = pages, active, on_retired, on_freed
        self._resident: OrderedDict[AdapterVersion, _Resident] = OrderedDict()  # least recently used first
        self._pinned: set[AdapterVersion] = set()
        self._holds: Counter[AdapterVersion] = Counter()
        self._retired: set[AdapterVersion] = set()
        self._copies: list[PendingCopy] = []
        self._evictable = 0
        pages.reclaim_from(self)

    def __len__(self) -> int:
        """Adapters that have pages."""
        return len(self._resident)

    def status(self, version: AdapterVersion) -> Residency:
        """An adapter whose load failed is "absent": see `HostStore.failure`."""
        if version in self._resident:
            return "resident"
        status = self._host.status(version)
        return "absent" if status == "failed" else status

    def request(self, version: AdapterVersion) -> None:
        """Begin to load it into host memory, now or, where there is no room yet, when it is asked for again."""
        if version not in self._resident:
            self._host.request(version)

    def spec(self, version: AdapterVersion) -> Spec:
        """Its ranks and base products. Raises InputError for one that cannot be served."""
        loaded = self.find(version)
        return self._loader.described(version).spec if loaded is None else loaded.spec

    def pages_needed(self, version: AdapterVersion) -> int:
        """Pages that it takes, loaded or not."""
        return self._loader.pages(self.spec(version))

    def make_resident(self, version: AdapterVersion) -> bool:
        """Give it pages, evicting what is idle; False where they are not enough, or it is not in host memory."""
        if version in self._resident:
            self._resident.move_to_end(version)
            return True
        loaded = self._host.peek(version)
        if loaded is None or loaded.blocks is None:
            self._host.request(version)
            return False
        if not self._pages.make_free(loaded.pages):
            return False
        taken = self._host.take(version) or loaded
        pages = self._pages.allocate(_owner(version), loaded.pages)
        self._resident[version] = _Resident(pages, replace(taken, blocks=None))
        self._evictable += len(pages)
        assert taken.blocks is not None
        if pages:
            self._copies.append(PendingCopy(version, pages, taken.blocks))
        return True

    def take_copies(self) -> list[PendingCopy]:
        """What must be written (`pool_writes.write_pages`) before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def pages_of(self, version: AdapterVersion) -> list[int]:
        """The pages of a resident adapter, in the stream's order."""
        return self._resident[version].pages

    def find(self, version: AdapterVersion) -> Loaded | None:
        """The adapter where it is in the pool or in host memory."""
        resident = self._resident.get(version)
        return self._host.peek(version) if resident is None else resident.loaded

    def pin(self, version: AdapterVersion) -> None:
        """A running sequence uses it: it cannot be evicted."""
        if version not in self._pinned:
            self._pinned.add(version)
            self._evictable -= len(self._resident[version].pages)
        self._resident.move_to_end(version)

    def unpin(self, version: AdapterVersion) -> None:
        """No running sequence uses it any more."""
        self._pinned.remove(version)
        self._evictable += len(self._resident[version].pages)
        self._resident.move_to_end(version)
        self._free_unused(version)

    def hold(self, version: AdapterVersion) -> None:
        """An accepted request is for this version: it stays loadable until as many `release`s."""
        self._holds[version] += 1

    def release(self, version: AdapterVersion) -> None:
        """A request that held it has ended."""
        self._holds[version] -= 1
        if not self._holds[version]:
            del self._holds[version]
        self._free_unused(version)

    def can_activate(self, version: AdapterVersion, running: Collection[AdapterVersion]) -> bool:
        """Whether one more row of it fits into the active set. running: one entry a running row."""
        return self._active.fits([(each, self.spec(each)) for each in (*running, version)])

    def evictable_pages(self) -> int:
        """Pages of adapters that no running sequence uses."""
        return self._evictable

    def evict(self, count: int) -> None:
        """Release at least `count` pages of adapters that are not pinned, least recently used first."""
        idle = [version for version in self._resident if version not in self._pinned]
        # A retired one may be gone from the disk: where it is still waited for, it goes last.
        for version in sorted(idle, key=lambda version: version in self._retired):
            if count <= 0:
                return
            count -= self._evict(version)

    def retire(self) -> None:
        """Free what was unloaded or replaced in the catalogue and is not in use. Call it in every step."""
        for version in self._catalogue.take_retired():
            self._retired.add(version)
            self._on_retired(version)
            self._free_unused(version)

    def _evict(self, version: AdapterVersion) -> int:
        pages = self._resident.pop(version).pages
        self._copies = [copy for copy in self._copies if copy.version != version]
        self._pages.release(_owner(version), pages)
        self._evictable -= len(pages)
        return len(pages)

    def _free_unused(self, version: AdapterVersion) -> None:
        if version not in self._retired or version in self._pinned or version in self._holds:
            return
        self._retired.remove(version)
        if version in self._resident:
            self._evict(version)
        self._host.drop(version)
        self._catalogue.forget(version)
        self._on_freed(version)


def _owner(version: AdapterVersion) -> Hashable:
    return ("adapter", version)
