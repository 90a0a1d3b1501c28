"""The waiting queue, fair between clients: virtual token counters (arXiv 2401.00588)."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Mapping

from jora.serve.scheduling.sequence import Sequence

INPUT_WEIGHT = 1.0  # of a computed prompt token; cached ones are not charged
OUTPUT_WEIGHT = 2.0
REMEMBERED = 4096  # clients; beyond this, idle ones whose counter would be lifted anyway are forgotten


class FairQueue:
    """Waiting sequences, a queue a client. The client with the smallest counter goes first, each in order of arrival.

    A counter is the service that the client had, divided by its weight. A client that comes to an empty own queue is
    lifted to the smallest counter of those who wait, or, where nobody waits, to that of the last client that left the
    queue: idle time earns nothing. Without `fair` all clients share one queue, first come, first served.
    """

    def __init__(self, fair: bool, weights: Mapping[str, float]):
        self._fair = fair
        self._weights = weights
        self.counters: dict[str, float] = {}  # by queue: the client's name, "" where there is one queue
        self.service: dict[str, float] = {}  # by client: weighted tokens, not divided by its weight
        self._queues: dict[str, deque[Sequence]] = {}
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
        for queue in self._queues.values():
            yield from queue

    def push(self, sequence: Sequence) -> None:
        """A new request arrives."""
        name = self._name(sequence)
        if name not in self._queues:
            self._lift(name)
            self._queues[name] = deque()
            self.restore(name)
        self._queues[name].append(sequence)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """It is admitted, or gone."""
        name = self._name(sequence)
        queue = self._queues[name]
        if queue[0] is sequence:
            queue.popleft()
        else:
            queue.remove(sequence)
        self._size -= 1
        if not queue:
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

    def waiting_of(self, name: str) -> deque[Sequence]:
        """The sequences of a queue that is not empty, in order of arrival."""
        return self._queues[name]

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
