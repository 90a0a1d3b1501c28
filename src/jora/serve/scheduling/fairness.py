"""The waiting queue, fair between clients: virtual token counters (arXiv 2401.00588)."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice

from jora.serve.scheduling.line import Line
from jora.serve.scheduling.sequence import Sequence

INPUT_WEIGHT = 1.0  # of a computed prompt token; cached ones are not charged
OUTPUT_WEIGHT = 2.0
REMEMBERED = 4096  # clients; beyond this, idle ones whose counter would be lifted anyway are forgotten


class FairQueue:
    """Waiting sequences, a queue a client. The client with the smallest counter goes first, each in order of arrival.

    A counter is the service that the client had, divided by its weight. A client that comes to an empty own queue is
    lifted to the smallest counter of those who wait, or, where nobody waits, to that of the last client that left the
    queue: idle time earns nothing. Without `fair` all clients share one queue, first come, first served.

    Who cannot run yet, whatever its turn, may be set aside. It waits like all others, for its client's counter too, and
    has its place again when it is put back.
    """

    def __init__(self, fair: bool, weights: Mapping[str, float]):
        self._fair = fair
        self._weights = weights
        self.counters: dict[str, float] = {}  # by queue: the client's name, "" where there is one queue
        self.service: dict[str, float] = {}  # by client: weighted tokens, not divided by its weight
        self.waiting: Counter[str] = Counter()  # sequences of each client that has any
        self._queues: dict[str, Line] = {}
        self._aside: OrderedDict[Sequence, None] = OrderedDict()  # of all queues; those last asked after at the end
        self._next_arrival = 0
        self._running: Counter[str] = Counter()
        self._numbers: dict[str, int] = {}  # breaks ties: who came first
        self._heap: list[
            tuple[float, int, str]
        ] = []  # counters only rise, so a stale entry stands too early, never too late
        self._listed: set[str] = set()
        self._next_number = 0
        self._last_left: str | None = None
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._queues.values():
            yield from (*line.ready, *line.aside)

    def push(self, sequence: Sequence) -> None:
        """A new request arrives."""
        name = self._name(sequence)
        if name not in self._queues:
            self._lift(name)
            self._queues[name] = Line()
            self.restore(name)
        sequence.number, self._next_arrival = self._next_arrival, self._next_arrival + 1
        self._queues[name].push(sequence)
        self.waiting[sequence.client] += 1
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """It is admitted, or gone."""
        name = self._name(sequence)
        self._queues[name].remove(sequence)
        self._aside.pop(sequence, None)
        self._size -= 1
        self.waiting[sequence.client] -= 1
        if not self.waiting[sequence.client]:
            del self.waiting[sequence.client]
        if not self._queues[name]:
            del self._queues[name]
            self._last_left = name

    def smallest(self) -> str | None:
        """Take the queue whose turn it is out of the order; give it back by `restore`. None: no further one waits."""
        while self._heap:
            counter, number, name = heapq.heappop(self._heap)
            if name in self._queues and self.counters[name] > counter:
                heapq.heappush(self._heap, (self.counters[name], number, name))
                continue
            self._listed.discard(name)
            if name in self._queues:
                return name
        return None

    def restore(self, name: str) -> None:
        """Put a queue back into the order; nothing happens where it has become empty."""
        if name in self._queues and name not in self._listed:
            self._listed.add(name)
            heapq.heappush(self._heap, (self.counters[name], self._numbers[name], name))

    def waiting_of(self, name: str, newest_first: bool = False) -> Iterator[Sequence]:
        """The sequences of a queue that is not empty, in order of arrival."""
        return self._queues[name].in_turn(newest_first)

    def ready_of(self, name: str, newest_first: bool = False) -> Iterator[Sequence]:
        """Those of them that are not set aside."""
        ready = self._queues[name].ready
        return reversed(ready) if newest_first else iter(ready)

    def set_aside(self, sequence: Sequence) -> None:
        """It cannot run yet, whatever its turn."""
        self._queues[self._name(sequence)].set_aside(sequence)
        self._aside[sequence] = None

    def put_back(self, sequence: Sequence) -> None:
        """One that was set aside can run now."""
        self._queues[self._name(sequence)].put_back(sequence)
        del self._aside[sequence]

    def some_aside(self, most: int) -> list[Sequence]:
        """Of those that are set aside so many at most, and others the next time: everyone's turn comes."""
        found = list(islice(self._aside, most))
        for sequence in found:
            self._aside.move_to_end(sequence)
        return found

    def charge_input(self, sequence: Sequence) -> None:
        """At its first admission: for the prompt tokens that are computed."""
        self._running[self._name(sequence)] += 1
        self._charge(sequence, INPUT_WEIGHT * (sequence.prompt_length - sequence.cached))

    def charge_output(self, sequence: Sequence) -> None:
        """For one new token."""
        self._charge(sequence, OUTPUT_WEIGHT)

    def ended(self, sequence: Sequence) -> None:
        """It was admitted once and has ended."""
        self._running[self._name(sequence)] -= 1

    def _name(self, sequence: Sequence) -> str:
        return sequence.client if self._fair else ""

    def _charge(self, sequence: Sequence, amount: float) -> None:
        client = sequence.client
        self.service[client] = self.service.get(client, 0.0) + amount
        if self._fair:
            self.counters[client] += amount / self._weights.get(client, 1.0)

    def _floor(self) -> float:
        """What a client that comes to an empty own queue is lifted to."""
        name = self.smallest()
        if name is not None:
            self.restore(name)
            return self.counters[name]
        return self.counters.get(self._last_left, 0.0) if self._last_left is not None else 0.0

    def _lift(self, name: str) -> None:
        floor = self._floor()
        if len(self.counters) > REMEMBERED:
            self._forget(floor)
        if name not in self.counters:
            self.counters[name], self._numbers[name] = 0.0, self._next_number
            self._next_number += 1
        self.counters[name] = max(self.counters[name], floor)

    def _forget(self, floor: float) -> None:
        for name in list(self.counters):
            idle = name not in self._queues and not self._running[name] and name != self._last_left
            if idle and self.counters[name] <= floor:
                for books in (self.counters, self.service, self._numbers, self._running):
                    books.pop(name, None)
