"""Requests that come too late or too many: deadlines, early abort by SLO, a full queue, and when to try again."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping

from jora.serve.scheduling.sequence import Sequence

NEW, OLD = 0.7, 0.3  # S-LoRA's weights of its moving averages
RECENT = 64  # ends that the service rate is measured over
QUEUES = 2  # the waiting sequences of all clients are at most so many times `max_queue`, whoever asks
LEAST_RETRY, MOST_RETRY = 1.0, 60.0  # seconds


def has_its_share(client: str, waiting: Mapping[str, int], most: int) -> bool:
    """Whether a queue of `most` sequences, which is full, has no place for one more of this client.

    One client may fill the queue, but not against the others: each may still have its even share of `most`, until
    there are `QUEUES` times as many. waiting: sequences, by client.
    """
    if sum(waiting.values()) >= QUEUES * most:
        return True
    return waiting.get(client, 0) * len(waiting.keys() | {client}) >= most


class Deadlines:
    """Whose time is up, without looking at everybody: a heap of deadlines and a queue of arrivals."""

    def __init__(self, slo: float | None):
        self._slo = slo
        self._heap: list[tuple[float, int, Sequence]] = []
        self._arrivals: deque[Sequence] = deque()
        self._count = 0
        self._stale = 0

    def watch(self, sequence: Sequence) -> None:
        """From its submission on."""
        if sequence.request.deadline is not None:
            heapq.heappush(self._heap, (sequence.request.deadline, self._count, sequence))
            self._count += 1
        if self._slo is not None:
            self._arrivals.append(sequence)

    def ended(self, sequence: Sequence) -> None:
        """It needs no watching any more; it is forgotten, in time, even if its deadline is far away."""
        if sequence.request.deadline is None:
            return
        self._stale += 1
        if self._stale > 64 and 2 * self._stale > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].state != "finished"]
            heapq.heapify(self._heap)
            self._stale = 0

    def past(self, now: float, first_token_time: float) -> Iterator[Sequence]:
        """Sequences past their deadline, in any state, and waiting ones that cannot meet the SLO any more.

        first_token_time: seconds that a first token takes from admission on.
        """
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.state != "finished":
                yield sequence
        # At most half of the SLO: otherwise one slow request would have everybody aborted from then on.
        margin = 0.0 if self._slo is None else min(first_token_time, self._slo / 2)
        while self._arrivals and self._slo is not None:
            sequence = self._arrivals[0]
            never_admitted = sequence.order is None and sequence.state != "finished"
            if never_admitted and now - sequence.arrival + margin <= self._slo:
                return
            self._arrivals.popleft()
            if never_admitted:
                yield sequence


class Load:
    """Moving averages of what comes and what is served."""

    def __init__(self) -> None:
        self.first_token_time = 0.0  # seconds from admission
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._arrived = 0
        self._arrivals = 0.0  # a round of admissions
        self._admissions = 0.0

    @property
    def overloaded(self) -> bool:
        """More requests come than are admitted."""
        return self._arrivals > self._admissions

    def arrived(self) -> None:
        """One request was submitted."""
        self._arrived += 1

    def admitted(self, count: int) -> None:
        """One round of admissions, which are what S-LoRA's averages are taken over."""
        self._arrivals = NEW * self._arrived + OLD * self._arrivals
        self._admissions = NEW * count + OLD * self._admissions
        self._arrived = 0

    def first_token(self, seconds: float) -> None:
        """A sequence has its first token, so long after its admission."""
        self.first_token_time = NEW * seconds + OLD * self.first_token_time

    def ended(self, now: float) -> None:
        """One sequence was served to its end."""
        self._ends.append(now)

    def retry_after(self, waiting: int, now: float) -> float:
        """Seconds in which half of the queue is served at the recent rate, within 1 and 60."""
        if len(self._ends) < 2:
            return LEAST_RETRY
        rate = (len(self._ends) - 1) / max(now - self._ends[0], 1e-9)
        return min(max(waiting / 2 / rate, LEAST_RETRY), MOST_RETRY)
