"""The scheduler: what runs in the next step, which pages it has, and whose turn it is."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

from jora.errors import InputError
from jora.serve.options import EngineOptions
from jora.serve.pages.allocator import Pages
from jora.serve.pages.layout import PoolLayout
from jora.serve.pages.prefix_cache import PrefixCache
from jora.serve.requests import FinishReason, Rejected
from jora.serve.scheduling.admission import Admission
from jora.serve.scheduling.batch import Batch, admission_order
from jora.serve.scheduling.fairness import FairQueue
from jora.serve.scheduling.forecast import Footprint
from jora.serve.scheduling.overload import Deadlines, Load, has_its_share
from jora.serve.scheduling.plan import AdapterResidency, Chunk, Plan
from jora.serve.scheduling.sequence import AdapterVersion, Sequence
from jora.serve.scheduling.tables import PageTables

__all__ = ["AdapterResidency", "Chunk", "Plan", "Scheduler"]

REMEMBERED = 4096  # names of unloaded adapters, the latest


class Scheduler:
    """Continuous batching over one pool of pages, for `jora.serve.Engine`. Not thread-safe.

    A step is `plan`, the dispatch of its programs, `after_dispatch`; `submit`, `append`, `finish`, `cancel` and
    `drop_adapter` come between steps. The plan of a step is made before the tokens of the one before are known: rows
    advance by counting, and a sequence that turns out to have ended costs one wasted row.

    One chunk of prefill is computed a step. Chunks alternate between the oldest prompt, which so cannot starve, and the
    one with the least left, which so waits for every other chunk of a long one at most.
    """

    def __init__(
        self,
        options: EngineOptions,
        layout: PoolLayout,
        pages: Pages,
        prefix_cache: PrefixCache | None,
        adapters: AdapterResidency,
        clock: Callable[[], float],
    ):
        self._options = options
        self._layout = layout
        self._pages = pages
        self._cache = prefix_cache
        self._adapters = adapters
        self._clock = clock
        self._tables = PageTables(layout, pages, prefix_cache)
        self._footprint = Footprint(layout, options.chunk)
        self._queue = FairQueue(options.scheduler == "vtc", options.weights)
        self._deadlines = Deadlines(options.slo)
        self._load = Load()
        self._batch = Batch(options.max_batch, pages, self._tables, adapters)
        self._admission = Admission(
            options, pages, self._tables, self._footprint, adapters, self._queue, self._batch, self._load
        )
        self._dropped: OrderedDict[str, int] = OrderedDict()  # of names that were unloaded, their latest version
        self._oldest_next = True  # whose turn the next chunk is

    @property
    def waiting_count(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._queue) + len(self._batch.preempted)

    @property
    def running_count(self) -> int:
        """Sequences in prefill and decode."""
        return len(self._batch.active)

    @property
    def service(self) -> dict[str, float]:
        """Weighted tokens that each client was served: 1 a computed prompt token, 2 a new one."""
        return self._queue.service

    @property
    def counters(self) -> dict[str, float]:
        """VTC's counters: service over weight, lifted where a client was idle."""
        return self._queue.counters

    def submit(self, sequence: Sequence) -> None:
        """Put a new sequence in the queue; its arrival is now.

        Raises InputError for one that would not fit the pool alone, and Rejected while the queue is full and its client
        has its share of it.
        """
        now = self._clock()
        need = self._footprint.most(sequence) + self._adapter_pages(sequence.adapter)
        if need > (pool := self._pages.total - 1):
            raise InputError(
                f"request {sequence.request.id} needs up to {need} pages and the pool has {pool}: "
                "ask for fewer tokens, or serve with a larger pool"
            )
        full = self.waiting_count >= self._options.max_queue
        if full and has_its_share(sequence.client, self._waiting(), self._options.max_queue):
            raise Rejected(
                f"the queue is full ({self._options.max_queue} requests); try again later",
                self._load.retry_after(self.waiting_count, now),
            )
        sequence.arrival = now
        if (version := sequence.adapter) is not None and version.version <= self._dropped.get(version.name, -1):
            sequence.cacheable = False
        self._load.arrived()
        self._deadlines.watch(sequence)
        self._queue.push(sequence)

    def _waiting(self) -> Counter[str]:
        """`waiting_count` by client."""
        return self._queue.waiting + Counter(s.client for s in self._batch.preempted)

    def longest(self, adapter: AdapterVersion | None, most: int) -> int:
        """Positions, up to `most`, of the longest sequence that the pool holds beside its adapter."""
        return self._footprint.longest(self._pages.total - 1 - self._adapter_pages(adapter), most)

    def _adapter_pages(self, adapter: AdapterVersion | None) -> int:
        return 0 if adapter is None else self._adapters.pages_needed(adapter)

    def plan(self) -> Plan:
        """The next step: who decodes, which chunk is computed, and who came, went or must begin again."""
        now = self._clock()
        expired = self._expire(now)
        preempted: list[Sequence] = []
        decode = self._decode_rows(preempted)
        admitted = [] if preempted else self._admission.round(now)
        chunk = self._next_chunk(preempted)
        if preempted:
            decode = [s for s in decode if s.slot is not None]
            stayed = [s for s in admitted if s.slot is not None]
            # Who came and went within this plan did neither, for the engine.
            preempted = [s for s in preempted if s not in admitted]
            admitted = stayed
        return Plan(decode, chunk, preempted, admitted, expired)

    def after_dispatch(self, plan: Plan) -> None:
        """The plan's programs have been dispatched: what they compute counts as computed."""
        for sequence in plan.decode:
            self._tables.advance(sequence, 1)
        if plan.prefill is None:
            return
        sequence = plan.prefill.sequence
        self._tables.advance(sequence, plan.prefill.count)
        self._tables.share(sequence, plan.prefill.start)
        if plan.prefill.last:
            sequence.state = "running"
            self._batch.prefilling.remove(sequence)

    def append(self, sequence: Sequence, token: int) -> None:
        """The host learns the next token of a sequence; not to be called for a token of an earlier epoch."""
        sequence.tokens.append(token)
        if sequence.first_token is None:
            sequence.first_token = self._clock()
            if sequence.admitted is not None:
                self._load.first_token(sequence.first_token - sequence.admitted)
        self._queue.charge_output(sequence)

    def finish(self, sequence: Sequence) -> None:
        """It has ended: its row and pages are free at once, its full blocks stay in the prefix cache."""
        self._load.ended(self._clock())
        self._leave(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """End it in whatever state it is; nothing happens to one that has ended."""
        if sequence.state != "finished":
            self._leave(sequence)

    def drop_adapter(self, version: AdapterVersion) -> None:
        """An adapter was unloaded or replaced: no prompt hits its blocks any more. Those who have it go on with it."""
        self._dropped[version.name] = max(version.version, self._dropped.pop(version.name, -1))
        if len(self._dropped) > REMEMBERED:
            self._dropped.popitem(last=False)
        for sequence in (*self._queue, *self._batch.preempted, *self._batch.active):
            if sequence.adapter == version:
                sequence.cacheable = False
        if self._cache is not None:
            self._cache.drop(version)

    def check(self) -> None:
        """AssertionError unless every page, row and pin is accounted for. O(pages); for tests."""
        self._pages.check()
        self._batch.check()
        if self._cache is not None:
            self._cache.check((s, page) for s in self._batch.active for table in s.tables for page in table if page)

    def _expire(self, now: float) -> list[tuple[Sequence, FinishReason]]:
        expired: list[tuple[Sequence, FinishReason]] = []
        for sequence in self._deadlines.past(now, self._load.first_token_time):
            self._leave(sequence)
            expired.append((sequence, "deadline"))
        return expired

    def _leave(self, sequence: Sequence) -> None:
        if sequence in self._batch.active:
            self._batch.leave(sequence)
        elif sequence.order is not None:
            self._batch.preempted.remove(sequence)
        else:
            self._queue.remove(sequence)
        if sequence.order is not None:
            self._queue.ended(sequence)
        sequence.state = "finished"
        self._deadlines.ended(sequence)

    def _decode_rows(self, preempted: list[Sequence]) -> list[Sequence]:
        """Rows with pages for their next position. The oldest is served first, so it loses none to a younger one."""
        ready = [s for s in self._batch.active if s.state == "running" and s.computed < s.limit]
        if self._options.optimistic:
            ready.sort(key=admission_order)
        for sequence in ready:
            if sequence.slot is not None and self._tables.missing(sequence, sequence.computed + 1):
                preempted += self._batch.make_room(sequence, sequence.computed + 1)
        return ready

    def _next_chunk(self, preempted: list[Sequence]) -> Chunk | None:
        while self._batch.prefilling:
            turn = admission_order if self._oldest_next else _what_is_left
            sequence = min(self._batch.prefilling, key=turn)
            left = sequence.length - sequence.computed
            count = min(left, self._options.chunk)
            preempted += self._batch.make_room(sequence, sequence.computed + count)
            if sequence.slot is not None:
                self._oldest_next = not self._oldest_next
                return Chunk(sequence, sequence.computed, count, count == left)
        return None


def _what_is_left(sequence: Sequence) -> tuple[int, int]:
    return sequence.length - sequence.computed, admission_order(sequence)
