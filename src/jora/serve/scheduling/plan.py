"""What the scheduler says to the engine, and what it asks of the adapters' residency."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from jora.serve.requests import FinishReason
from jora.serve.scheduling.sequence import AdapterVersion, Sequence

Residency = Literal["absent", "loading", "host", "resident"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `count` positions of a sequence from position `start`; the last chunk gives its next token."""

    sequence: Sequence
    start: int
    count: int
    last: bool


class Plan(NamedTuple):
    """One step. Sequences of `decode` and `prefill` have pages for what the step writes.

    preempted: to be computed again, their rows are free. admitted: have a row and their adapter's pages. expired: have
    left the scheduler already, with the reason to give.
    """

    decode: list[Sequence]
    prefill: Chunk | None
    preempted: list[Sequence]
    admitted: list[Sequence]
    expired: list[tuple[Sequence, FinishReason]]


class AdapterResidency(Protocol):
    """Where adapters are, from disk over host memory to the pool. All calls return at once."""

    def status(self, version: AdapterVersion) -> Residency: ...

    def request(self, version: AdapterVersion) -> None:
        """Begin to load it into host memory."""

    def pages_needed(self, version: AdapterVersion) -> int:
        """Pages that it takes; known from its registration on, whether it is loaded or not."""

    def make_resident(self, version: AdapterVersion) -> bool:
        """Give it pages, evicting unpinned adapters where needed; False where they are not enough."""

    def pin(self, version: AdapterVersion) -> None:
        """Called when the first running sequence uses it: it cannot be evicted."""

    def unpin(self, version: AdapterVersion) -> None:
        """Called when the last running sequence that used it has gone."""

    def can_activate(self, version: AdapterVersion, running: Collection[AdapterVersion]) -> bool:
        """Whether it fits into the active set beside those that run."""

    def evictable_pages(self) -> int:
        """Pages of the pool that unpinned adapters hold."""

    def evict(self, count: int) -> None:
        """Release at least `count` pages of unpinned adapters, least recently used first; all of them if fewer."""
