"""Adapters in host memory: loaded from disk by a few threads, least recently used ones dropped, bytes bounded.

One load a version is in flight, whoever asks. What was asked for and not yet taken (`take`) is dropped last, and a new
load only begins while such adapters leave room: of more waiting adapters than the memory holds, each gets its turn.
Compact adapters (NOLA) stay compact; their pages are made for the pool and dropped once they are in it.
"""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import RLock
from typing import Literal, NamedTuple, Protocol

from jora.errors import InputError
from jora.serve.adapters.loading import Loaded
from jora.serve.scheduling.sequence import AdapterVersion

Status = Literal["absent", "loading", "host", "failed"]
THREADS = 2
MAX_LOADING = 4 * THREADS
WANTED = 2.0  # s for which an adapter that nobody asks after again still counts as wanted
REMEMBERED = 10.0  # s for which a failure is told instead of tried again


class Source(Protocol):
    """Where adapters come from: `loading.Loader`."""

    def load(self, version: AdapterVersion) -> Loaded: ...

    def expand(self, loaded: Loaded, version: AdapterVersion) -> Loaded: ...


class Counts(NamedTuple):
    """What the store has done: requests that found their adapter here, and that did not; loads, and their time."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failures: int = 0
    seconds: float = 0.0


@dataclass
class _Held:
    loaded: Loaded
    touched: float  # when it was last asked for or taken; the store is in this order
    taken: bool = False


class HostStore:
    """At most `most_bytes` of adapters; safe to use from several threads."""

    def __init__(self, source: Source, most_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._source, self._most, self._clock = source, most_bytes, clock
        self._lock = RLock()
        self._held: OrderedDict[AdapterVersion, _Held] = OrderedDict()  # least recently used first
        self._loading: dict[AdapterVersion, Future[Loaded]] = {}
        self._failed: OrderedDict[AdapterVersion, tuple[float, InputError]] = OrderedDict()
        self._dropped: set[AdapterVersion] = set()  # while they were loading
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="adapters")
        self.nbytes = 0  # of all adapters that are held
        self.counts = Counts()

    def __len__(self) -> int:
        return len(self._held)

    def status(self, version: AdapterVersion) -> Status:
        """ "host": its pages can be taken. Asking keeps it. "failed": see `failure`."""
        with self._lock:
            if version in self._loading:
                return "loading"
            if (held := self._held.get(version)) is not None:
                self._touch(version, held, taken=False)
                return "host" if held.loaded.blocks is not None else "absent"
            return "absent" if self.failure(version) is None else "failed"

    def failure(self, version: AdapterVersion) -> InputError | None:
        """Why its last load failed, for a while; afterwards it may be tried again."""
        with self._lock:
            if version not in self._failed:
                return None
            when, error = self._failed[version]
            if self._clock() - when < REMEMBERED:
                return error
            del self._failed[version]
            return None

    def request(self, version: AdapterVersion) -> None:
        """Begin to load it, unless it is here, on its way, failed, or there is no room for now: then ask again."""
        with self._lock:
            status = self.status(version)
            if status == "host":
                self.counts = self.counts._replace(hits=self.counts.hits + 1)
            elif status == "absent" and self._has_room():
                self.counts = self.counts._replace(misses=self.counts.misses + 1)
                self._begin(version)

    def fetch(self, version: AdapterVersion) -> Loaded:
        """Load it now and wait. Raises InputError where that fails. Not for the engine's thread."""
        with self._lock:
            self._failed.pop(version, None)
            held = self._held.get(version)
            if held is not None and held.loaded.blocks is not None:
                self._touch(version, held, taken=False)
                return held.loaded
            future = self._loading.get(version) or self._begin(version)
        error = future.exception()  # waits
        self._settle(version, future)
        if error is not None:
            raise _told(version, error)
        return future.result()

    def take(self, version: AdapterVersion) -> Loaded | None:
        """The adapter with its pages, for the pool; None where it is not here (any more)."""
        with self._lock:
            held = self._held.get(version)
            if held is None or held.loaded.blocks is None:
                return None
            self._touch(version, held, taken=True)
            loaded = held.loaded
            if loaded.compact is not None:
                self._put(version, replace(held, loaded=replace(loaded, blocks=None)))
            return loaded

    def peek(self, version: AdapterVersion) -> Loaded | None:
        """What is held of a version, without using it."""
        with self._lock:
            held = self._held.get(version)
            return None if held is None else held.loaded

    def drop(self, version: AdapterVersion) -> None:
        """Free all that is kept of a version, or will be when its load has ended."""
        with self._lock:
            self._remove(version)
            self._failed.pop(version, None)
            if version in self._loading:
                self._dropped.add(version)

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self._pool.shutdown(cancel_futures=True)

    def _touch(self, version: AdapterVersion, held: _Held, taken: bool) -> None:
        held.touched, held.taken = self._clock(), taken
        self._held.move_to_end(version)

    def _put(self, version: AdapterVersion, held: _Held) -> None:
        self._remove(version)
        self._held[version] = held
        self.nbytes += held.loaded.nbytes

    def _remove(self, version: AdapterVersion) -> None:
        if (held := self._held.pop(version, None)) is not None:
            self.nbytes -= held.loaded.nbytes

    def _recent(self) -> Iterator[tuple[AdapterVersion, _Held]]:
        """What was touched within the time for which an adapter is wanted, latest first."""
        since = self._clock() - WANTED
        for version in reversed(self._held):
            held = self._held[version]
            if held.touched <= since:
                return
            yield version, held

    def _wanted(self) -> dict[AdapterVersion, int]:
        """Bytes of the adapters that somebody waits for."""
        return {v: h.loaded.nbytes for v, h in self._recent() if h.loaded.blocks is not None and not h.taken}

    def _has_room(self) -> bool:
        return len(self._loading) < MAX_LOADING and 2 * sum(self._wanted().values()) < self._most

    def _begin(self, version: AdapterVersion) -> Future[Loaded]:
        self._dropped.discard(version)
        held = self._held.get(version)
        future = self._pool.submit(self._load, version, None if held is None else held.loaded)
        self._loading[version] = future
        future.add_done_callback(lambda done: self._settle(version, done))
        return future

    def _load(self, version: AdapterVersion, compact: Loaded | None) -> Loaded:
        start = time.perf_counter()
        loaded = self._source.expand(compact or self._source.load(version), version)
        if loaded.nbytes > self._most:
            raise InputError(
                f"adapter {version.name!r}: takes {loaded.nbytes} bytes of host memory, its bound is {self._most};"
                " raise host_adapters_bytes"
            )
        seconds = time.perf_counter() - start
        with self._lock:
            self.counts = self.counts._replace(loads=self.counts.loads + 1, seconds=self.counts.seconds + seconds)
        return loaded

    def _settle(self, version: AdapterVersion, future: Future[Loaded]) -> None:
        """A load has ended: keep what it gave. Whoever comes first, the waiting caller or the thread, does it."""
        with self._lock:
            if self._loading.get(version) is not future:
                return
            del self._loading[version]
            gone = version in self._dropped
            self._dropped.discard(version)
            if future.cancelled() or gone:
                return
            if (error := future.exception()) is not None:
                self.counts = self.counts._replace(failures=self.counts.failures + 1)
                self._failed[version] = (self._clock(), _told(version, error))
                while len(self._failed) > 1000:
                    self._failed.popitem(last=False)
                return
            self._put(version, _Held(future.result(), self._clock()))
            self._shrink(version)

    def _shrink(self, new: AdapterVersion) -> None:
        """Drop adapters until the bound holds, those that nobody waits for first."""
        wanted = self._wanted()
        idle = [version for version in self._held if version not in wanted]
        for version in itertools.chain(idle, reversed(wanted)):
            if self.nbytes <= self._most:
                return
            if version != new:
                self._remove(version)


def _told(version: AdapterVersion, error: BaseException) -> InputError:
    """Files that nobody foresaw must stop their own requests alone."""
    if isinstance(error, InputError):
        return error
    told = InputError(f"adapter {version.name!r}: cannot be read ({type(error).__name__}: {str(error)[:200]})")
    told.__cause__ = error
    return told
