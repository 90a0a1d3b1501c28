"""How many pages the admitted sequences can come to need: S-LoRA's forecast for blocks, windows and chunked prefill."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from jora.serve.pages.layout import PoolLayout
from jora.serve.scheduling.sequence import Sequence

FOREVER = np.iinfo(np.int64).max // 2  # a step by which everything that decodes now has ended


class Footprint:
    """KV pages of a sequence, all groups, by its number of positions; rising, so a forecast need look at ends only.

    A sliding group holds at most a fixed number of blocks: fewer in decode, where one position is written a step, than
    in prefill, where a whole chunk's blocks are there at once.
    """

    def __init__(self, layout: PoolLayout, chunk: int):
        self._page_tokens = layout.page_tokens
        self._full = sum(group.window is None for group in layout.groups)
        windows = Counter(group.window for group in layout.groups if group.window is not None)
        self._decode: list[tuple[int, int]] = []  # (most blocks, groups)
        self._prefill: list[tuple[int, int]] = []
        for window, count in windows.items():
            group = next(g for g, each in enumerate(layout.groups) if each.window == window)
            page = layout.page_tokens
            begin = layout.blocks(window) * page  # from here on the pattern repeats every page
            spans = [q // page + 1 - layout.first_block(group, q) for q in range(begin, begin + page)]
            self._decode.append((max(spans), count))
            chunk_blocks = layout.blocks(begin + chunk) - layout.first_block(group, begin)
            self._prefill.append((max(chunk_blocks, max(spans)), count))

    def decoding(self, positions: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Most pages held while its positions up to this number are written one by one."""
        return self._pages(positions, self._decode)

    def prefilling(self, positions: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Most pages held on the way to so many positions, in chunks first and one by one then."""
        return self._pages(positions, self._prefill)

    def most(self, sequence: Sequence) -> int:
        """Pages that a sequence can need at once in all its life. One token more than it can have, as the forecast."""
        return int(self.prefilling(np.asarray(sequence.limit + 1)))

    def longest(self, pages: int, most: int) -> int:
        """Positions, up to `most`, of the longest sequence that so many pages always hold."""
        if self.prefilling(np.asarray(most)) <= pages:
            return most
        return bisect_right(range(1, most + 1), pages, key=lambda n: int(self.prefilling(np.asarray(n))))

    def now(self, sequence: Sequence) -> int:
        """Pages with which all that the host knows of it is computed, and its next token."""
        return int(self.prefilling(np.asarray(sequence.length + 1)))

    def _pages(self, positions: Int[np.ndarray, "..."], caps: list[tuple[int, int]]) -> Int[np.ndarray, "..."]:
        blocks = -(-positions // self._page_tokens)
        pages = self._full * blocks
        for cap, count in caps:
            pages = pages + count * np.minimum(blocks, cap)
        return pages


class Forecast:
    """The most KV pages that the admitted sequences can hold together, in this step or any later one.

    What decodes does so in lock-step: a sequence of `computed` positions holds those of `computed + t` in step t (this
    one is 1) and ends, one step after its last token at the latest, since the host learns of tokens a step late.
    S-LoRA's (arXiv 2311.03285) sum over the sequences that still run at each end is exact for these. What is in prefill
    may decode from the next step on or be delayed by others' chunks, so it is held to grow at once and never to end.
    Admit only while the peak fits, and the pool cannot be overrun: no step, and no end of a prefill, makes it rise.
    Pages of full groups that several use (`shared_pages`) are counted once, and held to stay for ever; no end of a user
    makes the peak rise by that, since the last user is then charged for its page again.
    """

    def __init__(
        self, footprint: Footprint, decoding: Iterable[Sequence], prefilling: Iterable[Sequence], shared_pages: int
    ):
        self._footprint = footprint
        running = list(decoding)
        computed = np.array([s.computed for s in running], np.int64)
        ends = np.array([s.limit for s in running], np.int64) - computed + 1
        self._steps = np.append(np.unique(ends), FOREVER)
        steps = self._steps[:-1]
        shared = np.array([s.shared for s in running], np.int64)
        held = (footprint.decoding(computed[:, None] + steps) - shared[:, None]) * (ends[:, None] >= steps)
        self._pages = np.append(held.sum(axis=0, dtype=np.int64), 0) + shared_pages
        for sequence in prefilling:
            self.add(sequence)

    @property
    def peak(self) -> int:
        """Pages."""
        return int(self._pages.max())

    def peak_with(self, sequence: Sequence) -> int:
        """The peak if this sequence were admitted."""
        return int((self._pages + self._growth(sequence)).max())

    def add(self, sequence: Sequence) -> None:
        """Admit it."""
        self._pages = self._pages + self._growth(sequence)

    def _growth(self, sequence: Sequence) -> Int[np.ndarray, "steps"]:
        positions = np.minimum(sequence.length - 1 + self._steps, sequence.limit + 1)
        return self._footprint.prefilling(positions) - sequence.shared
