"""The page tables of sequences: growing, returning what no window sees, sharing with the prefix cache."""

from __future__ import annotations

from jora.serve.pages.allocator import Pages
from jora.serve.pages.layout import PoolLayout
from jora.serve.pages.prefix_cache import PrefixCache, extend_keys, root_key
from jora.serve.scheduling.sequence import Sequence


class PageTables:
    """Moves pages between the pool, the prefix cache and the sequences' tables.

    Programs run in the order of their dispatch, so a page may change hands as soon as the last program that uses it
    has been dispatched.
    """

    def __init__(self, layout: PoolLayout, pages: Pages, cache: PrefixCache | None):
        self._layout = layout
        self._pages = pages
        self._cache = cache
        self.block_pages = len(layout.groups)  # of one block in all groups
        self._groups = range(len(layout.groups))
        windows: dict[int, list[int]] = {}
        for number, group in enumerate(layout.groups):
            if group.window is not None:
                windows.setdefault(group.window, []).append(number)
        self._windows = list(windows.values())  # groups that return their blocks together

    def keys(self, sequence: Sequence) -> list[bytes]:
        """The prefix-cache keys of all full blocks that the host knows; none where it takes no part in the cache."""
        if self._cache is None or not sequence.cacheable:
            return []
        root = b"" if sequence.keys else root_key(sequence.adapter, sequence.prefix_slots, sequence.salt)
        slots, page = sequence.prefix_slots, self._layout.page_tokens
        extend_keys(sequence.keys, root, slots, sequence.tokens, page)
        return sequence.keys

    def usable_keys(self, sequence: Sequence) -> list[bytes]:
        """The keys that it could hit at admission."""
        if sequence.request.sampling.prompt_logprobs is not None:
            return []
        return self.keys(sequence)[: (sequence.length - 1) // self._layout.page_tokens]

    def next_block(self, sequence: Sequence) -> int:
        """The block that its next chunk begins."""
        return sequence.computed // self._layout.page_tokens

    def start(self, sequence: Sequence) -> None:
        """Give it the blocks that the prefix cache has. Whoever wants its prompt's log probabilities computes them."""
        sequence.tables = [[] for _ in self._groups]
        sequence.held_from = [0] * len(self._windows)
        keys = self.keys(sequence)
        if self._cache is None or sequence.request.sampling.prompt_logprobs is not None:
            return
        blocks = self._cache.match(keys, sequence.length)
        sequence.tables = self._cache.acquire(keys, blocks, sequence)
        sequence.computed = blocks * self._layout.page_tokens
        sequence.held_from = [self._layout.first_block(groups[0], sequence.computed) for groups in self._windows]

    def missing(self, sequence: Sequence, positions: int) -> int:
        """Pages that it needs beside its own before `positions` positions are in the pool."""
        blocks = self._layout.blocks(positions)
        return max(0, blocks - len(sequence.tables[0])) * len(self._groups)

    def held(self, sequence: Sequence) -> int:
        """Pages in its tables, shared ones included."""
        if not sequence.tables:
            return 0
        blocks = len(sequence.tables[0])
        returned = zip(self._windows, sequence.held_from, strict=True)
        return blocks * len(self._groups) - sum(len(groups) * min(first, blocks) for groups, first in returned)

    @property
    def shared_pages(self) -> int:
        """Pages of full groups that more than one sequence uses."""
        return 0 if self._cache is None else self._cache.shared_pages

    def grow(self, sequence: Sequence, positions: int) -> None:
        """Take them. Raises PoolFull, with nothing taken, where they cannot be had."""
        count = self.missing(sequence, positions)
        if not count:
            return
        pages = self._pages.allocate(sequence.owner, count)
        each = count // len(self._groups)
        for group, table in enumerate(sequence.tables):
            table.extend(pages[group * each : (group + 1) * each])

    def advance(self, sequence: Sequence, count: int) -> None:
        """So many more positions have been dispatched: blocks that no later position sees are returned."""
        sequence.computed += count
        for number, groups in enumerate(self._windows):
            first = self._layout.first_block(groups[0], sequence.computed)
            held = sequence.held_from[number]
            if first > held:
                sequence.held_from[number] = first
                for group in groups:
                    self._return(sequence, group, held, min(first, len(sequence.tables[group])))

    def share(self, sequence: Sequence, start: int) -> None:
        """Let the prefix cache have the full blocks that it has computed from position `start` on."""
        for group in self._groups:
            self._publish(sequence, group, start // self._layout.page_tokens, len(sequence.tables[group]))

    def drop(self, sequence: Sequence) -> None:
        """Return everything, the deepest block first: of a chain the cache should forget the end before the root."""
        self.share(sequence, 0)
        own: list[int] = []
        for block in range(len(sequence.tables[0]) - 1, -1, -1):
            for table in sequence.tables:
                self._let_go(sequence, table, block, own)
        self._pages.release(sequence.owner, own)
        sequence.tables, sequence.held_from = [], []

    def _publish(self, sequence: Sequence, group: int, first: int, end: int) -> None:
        if self._cache is None or not (keys := self.keys(sequence)):
            return
        table = sequence.tables[group]
        for block in range(first, min(end, len(keys), sequence.computed // self._layout.page_tokens)):
            if table[block]:
                self._cache.publish(sequence.adapter, keys[block], group, table[block], sequence)

    def _return(self, sequence: Sequence, group: int, first: int, end: int) -> None:
        self._publish(sequence, group, first, end)  # a page that is free anyway may as well wait for a hit
        own: list[int] = []
        for block in range(first, end):
            self._let_go(sequence, sequence.tables[group], block, own)
        self._pages.release(sequence.owner, own)

    def _let_go(self, sequence: Sequence, table: list[int], block: int, own: list[int]) -> None:
        page = table[block]
        table[block] = 0
        if self._cache is not None and self._cache.holds(page):
            self._cache.release(page, sequence)
        elif page:
            own.append(page)
