"""One queue of waiting sequences, in order of arrival, where some may be set aside."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import merge

from jora.serve.scheduling.sequence import Sequence


class Line:
    """`ready`: those who wait for their turn. `aside`: those who first wait for something else, and whom nobody has to
    look past. A sequence's `number` is its place in both.
    """

    def __init__(self) -> None:
        self.ready: list[Sequence] = []
        self.aside: list[Sequence] = []

    def __bool__(self) -> bool:
        return bool(self.ready or self.aside)

    def push(self, sequence: Sequence) -> None:
        """It arrives: its number is the largest."""
        self.ready.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more. ValueError where it did not."""
        if not _take_out(self.ready, sequence) and not _take_out(self.aside, sequence):
            raise ValueError(f"{sequence.request.id} does not wait in this line")

    def set_aside(self, sequence: Sequence) -> None:
        """One of `ready` waits for something else first."""
        _take_out(self.ready, sequence)
        insort(self.aside, sequence, key=_number)

    def put_back(self, sequence: Sequence) -> None:
        """One that was set aside has its place again."""
        _take_out(self.aside, sequence)
        insort(self.ready, sequence, key=_number)

    def in_turn(self, newest_first: bool) -> Iterator[Sequence]:
        """All of them."""
        if newest_first:
            return merge(reversed(self.ready), reversed(self.aside), key=_number, reverse=True)
        return merge(self.ready, self.aside, key=_number)


def _number(sequence: Sequence) -> int:
    return sequence.number


def _take_out(line: list[Sequence], sequence: Sequence) -> bool:
    """Whether it was there."""
    at = bisect_left(line, sequence.number, key=_number)
    found = at < len(line) and line[at] is sequence
    if found:
        del line[at]
    return found
