"""An engine without a device: it runs the scheduler's plans on pages that remember what was written to them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from jora.serve.options import EngineOptions
from jora.serve.pages.allocator import Pages, PoolFull
from jora.serve.pages.layout import Group, PoolLayout
from jora.serve.pages.prefix_cache import PrefixCache
from jora.serve.requests import FinishReason, Request, SamplingOptions
from jora.serve.scheduling.plan import Residency
from jora.serve.scheduling.scheduler import Plan, Scheduler
from jora.serve.scheduling.sequence import AdapterVersion, Sequence


def pool_layout(windows: Many[int | None] = (None,), page_tokens: int = 4) -> PoolLayout:
    """A layout with one group of one layer for each window."""
    groups = tuple(Group("full" if w is None else "sliding", (layer,), w) for layer, w in enumerate(windows))
    return PoolLayout(groups, page_tokens, group_layers=1, shards=1, elements=8, dtype="float32")


class FakeAdapters:
    """Residency of adapters with a stated number of pages, which take `delay` ticks to load to the host."""

    def __init__(self, pages: Pages, sizes: dict[AdapterVersion, int], delay: int = 0, most_active: int = 1 << 30):
        self.pages, self.sizes, self.delay, self.most_active = pages, sizes, delay, most_active
        self.on_host: set[AdapterVersion] = set()
        self.loading: dict[AdapterVersion, int] = {}
        self.resident: OrderedDict[AdapterVersion, list[int]] = OrderedDict()
        self.pinned: set[AdapterVersion] = set()
        self.requested: list[AdapterVersion] = []
        pages.reclaim_from(self)

    def tick(self) -> None:
        for version in list(self.loading):
            self.loading[version] -= 1
            if self.loading[version] < 0:
                del self.loading[version]
                self.on_host.add(version)

    def status(self, version: AdapterVersion) -> Residency:
        if version in self.resident:
            return "resident"
        if version in self.on_host:
            return "host"
        return "loading" if version in self.loading else "absent"

    def request(self, version: AdapterVersion) -> None:
        assert version in self.sizes and self.status(version) == "absent"
        self.requested.append(version)
        self.loading[version] = self.delay

    def pages_needed(self, version: AdapterVersion) -> int:
        return self.sizes[version]

    def make_resident(self, version: AdapterVersion) -> bool:
        assert version in self.on_host and version not in self.resident
        try:
            self.resident[version] = self.pages.allocate(("adapter", version), self.sizes[version])
        except PoolFull:
            return False
        return True

    def pin(self, version: AdapterVersion) -> None:
        assert version in self.resident and version not in self.pinned
        self.pinned.add(version)
        self.resident.move_to_end(version)

    def unpin(self, version: AdapterVersion) -> None:
        self.pinned.remove(version)

    def can_activate(self, version: AdapterVersion, running: Collection[AdapterVersion]) -> bool:
        return len(running) < self.most_active

    def evictable_pages(self) -> int:
        return sum(len(p) for v, p in self.resident.items() if v not in self.pinned)

    def evict(self, count: int) -> None:
        for version in [v for v in self.resident if v not in self.pinned]:
            if count <= 0:
                return
            count -= self.sizes[version]
            self.pages.release(("adapter", version), self.resident.pop(version))


@dataclass
class Job:
    """What happens to one request: the tokens that the model would say, and when it is to stop or be cancelled."""

    sequence: Sequence
    answer: list[int]
    stop_after: int
    reason: FinishReason | None = None
    preempted: int = 0


@dataclass
class Simulation:
    """One step in flight, as in the engine: tokens of a step become known after the next one was planned."""

    options: EngineOptions
    layout: PoolLayout
    pool_pages: int
    sizes: dict[AdapterVersion, int] = field(default_factory=dict)
    delay: int = 0
    most_active: int = 1 << 30

    def __post_init__(self) -> None:
        self.now = 0.0
        self.pages = Pages(self.pool_pages)
        self.cache = PrefixCache(self.layout, self.pages) if self.options.prefix_cache else None
        self.adapters = FakeAdapters(self.pages, self.sizes, self.delay, self.most_active)
        self.scheduler = Scheduler(
            self.options, self.layout, self.pages, self.cache, self.adapters, clock=lambda: self.now
        )
        self.jobs: dict[Sequence, Job] = {}
        self._written: dict[tuple[int, int], tuple[object, ...]] = {}  # (page, place) -> what its key is made of
        self._in_flight: list[tuple[Sequence, int]] = []
        self.steps = 0
        self.tokens = 0
        self.plans: list[Plan] = []

    def submit(
        self,
        prompt: Many[int],
        max_tokens: int,
        *,
        adapter: AdapterVersion | None = None,
        client: str = "default",
        stop_after: int | None = None,
        deadline: float | None = None,
        prefix_slots: int = 0,
        index: int = 0,
        prompt_logprobs: int | None = None,
    ) -> Sequence:
        """Submit a request; its answer is made up from its number, so that it is the same when it is computed again."""
        number = len(self.jobs)
        sampling = SamplingOptions(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        name = adapter.name if adapter else None
        request = Request(str(number), tuple(prompt), sampling, name, client, deadline)
        sequence = Sequence(request, index, adapter, max_tokens, prefix_slots)
        self.scheduler.submit(sequence)
        answer = [1000 * number + i for i in range(max_tokens)]
        self.jobs[sequence] = Job(sequence, answer, min(stop_after or max_tokens, max_tokens))
        return sequence

    def step(self) -> Plan:
        """Plan, run, then read the tokens of the step before."""
        self.adapters.tick()
        plan = self.scheduler.plan()
        self.plans.append(plan)
        self._check(plan)
        for sequence, reason in plan.expired:
            self.jobs[sequence].reason = reason
        for sequence in plan.preempted:
            self.jobs[sequence].preempted += 1
        for sequence in plan.decode:
            self._compute(sequence, sequence.computed, 1)
        if plan.prefill:
            self._compute(plan.prefill.sequence, plan.prefill.start, plan.prefill.count)
        self.scheduler.after_dispatch(plan)
        before, self._in_flight = self._in_flight, [(s, s.epoch) for s in plan.decode]
        if plan.prefill and plan.prefill.last:
            self._in_flight.append((plan.prefill.sequence, plan.prefill.sequence.epoch))
        self._read(before)
        self.scheduler.check()
        self.steps += 1
        self.now += 1.0
        return plan

    def run(self, most_steps: int) -> None:
        """Step until everything has ended. AssertionError where that takes more steps."""
        for _ in range(most_steps):
            if not (self.scheduler.waiting_count or self.scheduler.running_count):
                return
            self.step()
        raise AssertionError(f"{self.scheduler.waiting_count} wait and {self.scheduler.running_count} run for ever")

    def cancel(self, sequence: Sequence) -> None:
        """The client has gone."""
        if self.jobs[sequence].reason is None:
            self.jobs[sequence].reason = "cancelled"
        self.scheduler.cancel(sequence)

    def all_pages_back(self) -> None:
        """AssertionError unless no sequence owns a page, and everything but page 0 could be given out."""
        assert self.pages.by_kind()["kv"] == 0
        assert self.pages.available == self.pool_pages - 1
        assert not self.adapters.pinned

    def _read(self, in_flight: list[tuple[Sequence, int]]) -> None:
        for sequence, epoch in in_flight:
            job = self.jobs[sequence]
            if sequence.state == "finished" or sequence.epoch != epoch:
                continue
            self.scheduler.append(sequence, job.answer[sequence.generated])
            self.tokens += 1
            if sequence.generated >= job.stop_after:
                job.reason = "length" if sequence.generated == sequence.max_tokens else "stop"
                self.scheduler.finish(sequence)

    def _check(self, plan: Plan) -> None:
        rows = [s.slot for s in plan.decode] + ([plan.prefill.sequence.slot] if plan.prefill else [])
        assert None not in rows and len(set(rows)) == len(rows)
        assert not {id(s) for s in plan.admitted} & {id(s) for s in plan.preempted}
        if not self.options.optimistic:
            assert not plan.preempted, "conservative admission has overrun the pool"
        if plan.prefill:
            assert plan.prefill.start % self.layout.page_tokens == 0
            assert 0 < plan.prefill.count <= self.options.chunk
        for sequence in [*plan.decode, *([plan.prefill.sequence] if plan.prefill else [])]:
            assert sequence.adapter is None or sequence.adapter in self.adapters.pinned

    def _compute(self, sequence: Sequence, start: int, count: int) -> None:
        """Write these positions, and see that all that they may look at is what this sequence's past would be."""
        size, slots = self.layout.page_tokens, sequence.prefix_slots
        past = (*sequence.request.prompt, *self.jobs[sequence].answer)

        def meaning(position: int) -> tuple[object, ...]:
            return (sequence.adapter, slots, position, past[: max(0, position - slots + 1)])

        for group, table in enumerate(sequence.tables):
            window = self.layout.groups[group].window
            for position in range(start, start + count):
                page = table[position // size]
                assert page and self.pages.owner_of(page) == sequence.owner, "written to a page that is not its own"
                self._written[page, position % size] = meaning(position)
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, start + count):
                page = table[position // size]
                assert page, f"position {position} was returned and is still seen from {start}"
                assert self._written[page, position % size] == meaning(position), "somebody else's keys and values"
