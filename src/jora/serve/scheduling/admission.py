"""Whose turn it is, and whether it fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

from jora.serve.options import EngineOptions
from jora.serve.pages.allocator import Pages
from jora.serve.scheduling.batch import Batch
from jora.serve.scheduling.fairness import FairQueue
from jora.serve.scheduling.forecast import Footprint, Forecast
from jora.serve.scheduling.overload import Load
from jora.serve.scheduling.plan import AdapterResidency
from jora.serve.scheduling.sequence import AdapterVersion, Sequence
from jora.serve.scheduling.tables import PageTables

# Prompts in prefill at a time. One chunk is computed a step, so more would only settle earlier who goes next; fewer
# would let a few long prompts hold up the short ones behind them.
PREFILLING = 4
LOOKED_AT = 256  # waiting sequences that one round looks at in a queue, and of all that are set aside, at most
PREFETCHED = 8  # waiting sequences, in the order of their turn, whose adapters are loaded early


class Admission:
    """Rounds of admission, one sequence at a time.

    The queue says whose turn it is. A sequence whose adapter is not in host memory yet, or whose soft prompt is not
    made, is set aside and asked after in later rounds; however many there are, they hold up nobody, and each keeps its
    place. One whose next prompt block another one is computing just now (then it will hit it; the answers of n > 1 are
    the usual case) is passed over. The first that does not fit ends the round, so that nothing large starves. Preempted
    sequences come before the queue.

    Within the queue that fairness has chosen: with an SLO and more coming than is served, the newest first (S-LoRA's
    early abort drops the others), else the oldest; with `cluster` adapters running, the first whose adapter runs,
    unless the one that it would overtake was overtaken `max_batch` times.
    """

    def __init__(
        self,
        options: EngineOptions,
        pages: Pages,
        tables: PageTables,
        footprint: Footprint,
        adapters: AdapterResidency,
        queue: FairQueue,
        batch: Batch,
        load: Load,
    ):
        self._options = options
        self._pages = pages
        self._tables = tables
        self._footprint = footprint
        self._adapters = adapters
        self._queue = queue
        self._batch = batch
        self._load = load
        self._last_try: tuple[int, int] | None = None

    def round(self, now: float) -> list[Sequence]:
        """Admit who fits: they have rows, resident adapters and the pages that the prefix cache holds for them."""
        self._prefetch()
        self._forecast: Forecast | None = None
        self._looked_at: Counter[str] = Counter()  # by queue
        admitted: list[Sequence] = []
        for sequence in list(self._batch.preempted):
            if not self._is_here(sequence) or self._is_being_computed(sequence):
                continue
            if not self._place(sequence):
                return admitted
            self._batch.preempted.remove(sequence)
            admitted.append(sequence)
        new = self._from_queue(now)
        if new:
            self._load.admitted(len(new))
        return admitted + new

    def _from_queue(self, now: float) -> list[Sequence]:
        admitted: list[Sequence] = []
        passed_over: list[str] = []
        if self._has_row():
            self._put_back()
        while self._has_row() and (name := self._queue.smallest()) is not None:
            sequence, overtaken = self._pick(name)
            if sequence is None:
                passed_over.append(name)
                continue
            placed = self._place(sequence)
            if placed:
                sequence.admitted = now
                sequence.cached = max(0, sequence.computed - sequence.prefix_slots)
                self._queue.remove(sequence)
                self._queue.charge_input(sequence)
                admitted.append(sequence)
                if overtaken is not None:
                    overtaken.overtaken += 1
            self._queue.restore(name)
            if not placed:
                break
        for name in passed_over:
            self._queue.restore(name)
        return admitted

    def _has_row(self) -> bool:
        return bool(self._batch.free_rows) and len(self._batch.prefilling) < PREFILLING

    def _put_back(self) -> None:
        """Who waited for an adapter or a soft prompt that is here now takes its place again."""
        for sequence in self._queue.some_aside(LOOKED_AT):
            if self._is_here(sequence):
                self._queue.put_back(sequence)

    @property
    def _newest_first(self) -> bool:
        return self._options.slo is not None and self._load.overloaded

    def _able(self, name: str) -> Iterator[Sequence]:
        """The sequences of a queue that wait for nothing but their turn, as far as this round looks."""
        left = LOOKED_AT - self._looked_at[name]
        for sequence in list(islice(self._queue.ready_of(name, self._newest_first), left)):
            self._looked_at[name] += 1
            if not self._is_here(sequence):
                self._queue.set_aside(sequence)
            elif not self._is_being_computed(sequence):
                yield sequence

    def _pick(self, name: str) -> tuple[Sequence | None, Sequence | None]:
        """The next sequence of this queue that could run now, and the one that it overtakes."""
        versions = self._batch.versions
        cluster = 0 < self._options.cluster <= len(versions)
        first: Sequence | None = None
        for sequence in self._able(name):
            if not cluster or sequence.adapter is None or sequence.adapter in versions:
                return sequence, first
            if first is None:
                first = sequence
                if first.overtaken >= self._options.max_batch:
                    break
        return first, None

    def _is_here(self, sequence: Sequence) -> bool:
        """Whether its adapter is in host memory or the pool, and its soft prompt is made. Begins to load the former."""
        version = sequence.adapter
        if version is not None and version not in self._batch.versions:
            status = self._adapters.status(version)
            if status in ("absent", "loading"):
                if status == "absent":
                    self._adapters.request(version)
                sequence.state = "loading"
                return False
        if not sequence.ready:
            sequence.state = "loading"
            return False
        sequence.state = "waiting"
        return True

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a prompt in prefill is about to compute a block that this one could hit.

        Blocks before that one are then in the cache, since a key says everything that came before it.
        """
        if not self._batch.prefilling:
            return False
        keys = self._tables.usable_keys(sequence)
        for other in self._batch.prefilling:
            block = self._tables.next_block(other)
            if block < len(keys) and block < len(other.keys) and keys[block] == other.keys[block]:
                return True
        return False

    def _place(self, sequence: Sequence) -> bool:
        """Give it a row, its adapter and its cached pages, if it fits."""
        version = sequence.adapter
        joins = version is not None and version not in self._batch.versions
        if not self._has_row() or not self._can_activate(version):
            return False
        adapter_pages = self._adapters.pages_needed(version) if version is not None and joins else 0
        if not self._start_if_it_fits(sequence, adapter_pages):
            return False
        if version is not None and joins and self._adapters.status(version) != "resident":
            self._pages.make_free(adapter_pages)
            if not self._adapters.make_resident(version):
                self._take_back(sequence)
                return False
        self._batch.enter(sequence)
        if self._forecast is not None:
            self._forecast.add(sequence)
        return True

    def _start_if_it_fits(self, sequence: Sequence, adapter_pages: int) -> bool:
        """Its tables begin with what the prefix cache has, if it fits.

        Pages that it shares with others cost nothing, but to know them is to take them. Where it does not fit without
        them, that is tried when something has ended since the last try, not in every step.
        """
        fits = self._fits(sequence, adapter_pages)
        attempt = (id(sequence), self._batch.departures)
        if not fits and (self._last_try == attempt or not self._tables.usable_keys(sequence)):
            return False
        shared = self._tables.shared_pages
        self._tables.start(sequence)
        if self._tables.shared_pages != shared:
            self._forecast = None  # others share now what they held alone
        if not fits and not self._fits(sequence, adapter_pages):
            self._take_back(sequence)
            self._last_try = attempt
            return False
        return True

    def _take_back(self, sequence: Sequence) -> None:
        self._tables.drop(sequence)
        sequence.computed = 0
        self._forecast = None

    def _can_activate(self, version: AdapterVersion | None) -> bool:
        """Whether one more row of the adapter finds room in the active set: base products are counted by row."""
        return version is None or self._adapters.can_activate(version, list(self._batch.versions.elements()))

    def _fits(self, sequence: Sequence, adapter_pages: int) -> bool:
        if self._options.optimistic:
            return self._fits_now(sequence, adapter_pages)
        if self._forecast is None:
            decoding = (s for s in self._batch.active if s.state == "running")
            self._forecast = Forecast(self._footprint, decoding, self._batch.prefilling, self._tables.shared_pages)
        pinned = self._pages.by_kind()["adapter"] - self._adapters.evictable_pages()
        return self._forecast.peak_with(sequence) + adapter_pages + pinned <= self._pages.total - 1

    def _fits_now(self, sequence: Sequence, adapter_pages: int) -> bool:
        """What it and the prompts in prefill still need, and one more block for everyone who runs, is available."""
        others = sum(max(0, self._footprint.now(s) - self._tables.held(s)) for s in self._batch.prefilling)
        watermark = self._tables.block_pages * len(self._batch.active)
        need = self._footprint.now(sequence) - self._tables.held(sequence) + adapter_pages
        return need + others + watermark <= self._pages.available

    def _prefetch(self) -> None:
        names = list(islice(iter(self._queue.smallest, None), PREFETCHED))
        for name in names:
            waiting = self._queue.waiting_of(name, self._newest_first)
            for sequence in islice(waiting, PREFETCHED // len(names)):
                version = sequence.adapter
                if version is not None and self._adapters.status(version) == "absent":
                    self._adapters.request(version)
            self._queue.restore(name)
