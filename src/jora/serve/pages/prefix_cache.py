"""Pages of finished computation, kept for prompts that begin alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jora.serve.pages.allocator import CACHE, Pages
from jora.serve.pages.layout import PoolLayout

DIGEST = 32  # bytes: prompts come from strangers, so a collision must be out of anybody's reach


def root_key(adapter: tuple[str, int] | None, prefix_slots: int, salt: bytes) -> bytes:
    """The parent of first blocks: whose keys and values these are, before any token."""
    return hashlib.blake2b(repr((adapter, prefix_slots)).encode() + b"\0" + salt, digest_size=DIGEST).digest()


def extend_keys(keys: list[bytes], root: bytes, prefix_slots: int, tokens: Sequence[int], page_tokens: int) -> None:
    """Append the keys of the full blocks of `prefix_slots + len(tokens)` positions that `keys` does not have yet.

    A block's key is a hash of its parent's key and its own tokens; soft-prompt slots take positions and have no tokens.
    """
    blocks = (prefix_slots + len(tokens)) // page_tokens
    if len(keys) == blocks:
        return
    begin = max(0, len(keys) * page_tokens - prefix_slots)
    data = np.asarray(tokens[begin : blocks * page_tokens - prefix_slots], dtype="<i8").tobytes()
    parent = keys[-1] if keys else root
    for block in range(len(keys), blocks):
        first, end = (max(0, b * page_tokens - prefix_slots) - begin for b in (block, block + 1))
        parent = hashlib.blake2b(parent + data[8 * first : 8 * end], digest_size=DIGEST).digest()
        keys.append(parent)


class User(Protocol):
    """A sequence, as the cache sees it. shared: its pages of full groups that another one uses too."""

    shared: int

    @property
    def owner(self) -> Hashable: ...


@dataclass(slots=True)
class _Block:
    version: Hashable
    pages: list[int]  # by group; 0 where not held


@dataclass(slots=True)
class _Use:
    key: bytes | None  # None: no prompt may hit it any more, it is freed by its last user
    group: int
    users: list[User]


class PrefixCache:
    """Full blocks by key, a page a group. Pages that no sequence uses wait in LRU order and count as free.

    A block's groups come and go alone: a sliding group's page is often returned long before a full group's.
    `shared_pages` of full groups have more than one user.
    """

    def __init__(self, layout: PoolLayout, pages: Pages):
        self._layout = layout
        self._pages = pages
        self._groups = len(layout.groups)
        self._full = [g for g, group in enumerate(layout.groups) if group.window is None]
        self._sliding = [g for g, group in enumerate(layout.groups) if group.window is not None]
        self._blocks: dict[bytes, _Block] = {}
        self._versions: dict[Hashable, set[bytes]] = {}
        self._uses: dict[int, _Use] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages without users, the least recently used first
        self.shared_pages = 0
        pages.reclaim_from(self)

    def match(self, keys: Sequence[bytes], length: int) -> int:
        """Blocks that a sequence of `length` positions, with these keys, need not compute; at least one position is.

        Full groups need every block, sliding ones those that the first computed position can see.
        """
        blocks = self._present(keys[: (length - 1) // self._layout.page_tokens])
        held = [self._run_lengths(keys[:blocks], group) for group in self._sliding]
        while blocks:
            position = blocks * self._layout.page_tokens
            needs = [blocks - self._layout.first_block(group, position) for group in self._sliding]
            if all(run[blocks - 1] >= need for run, need in zip(held, needs, strict=True)):
                return blocks
            blocks -= 1
        return 0

    def acquire(self, keys: Sequence[bytes], blocks: int, user: User) -> list[list[int]]:
        """Use the first `blocks` blocks, as `match` counted them: `[groups][blocks]`, 0 where out of the window."""
        position = blocks * self._layout.page_tokens
        tables = []
        for group in range(self._groups):
            first = self._layout.first_block(group, position) if blocks else 0
            table = [0] * first + [self._blocks[key].pages[group] for key in keys[first:blocks]]
            for page in table[first:]:
                use = self._uses[page]
                use.users.append(user)
                if len(use.users) == 1:
                    del self._idle[page]
                elif use.group in self._full:
                    self._now_shared(use)
            tables.append(table)
        return tables

    def publish(self, version: Hashable, key: bytes, group: int, page: int, user: User) -> None:
        """Take over a sequence's full page, which goes on using it; nothing happens where the cache has this block."""
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(version, [0] * self._groups)
            self._versions.setdefault(version, set()).add(key)
        if block.pages[group] or page in self._uses:
            return
        self._pages.transfer(page, user.owner, CACHE)
        block.pages[group] = page
        self._uses[page] = _Use(key, group, [user])

    def holds(self, page: int) -> bool:
        """Whether the page is the cache's (and so is given back to it, not to the allocator)."""
        return page in self._uses

    def release(self, page: int, user: User) -> None:
        """A sequence uses the page no longer."""
        use = self._uses[page]
        if len(use.users) > 1 and use.group in self._full:
            user.shared -= 1
            if len(use.users) == 2:
                self.shared_pages -= 1
                use.users[use.users[0] is user].shared -= 1
        use.users.remove(user)
        if use.users:
            return
        if use.key is None:
            del self._uses[page]
            self._pages.release(CACHE, (page,))
        else:
            self._idle[page] = None

    def evictable_pages(self) -> int:
        """Pages that no sequence uses."""
        return len(self._idle)

    def evict(self, count: int) -> None:
        """Free the `count` least recently used of them."""
        for _ in range(min(count, len(self._idle))):
            page, _none = self._idle.popitem(last=False)
            self._forget(page)

    def drop(self, version: Hashable) -> None:
        """Forget every block of an adapter's version; pages that sequences still use go with their last user."""
        for key in self._versions.pop(version, ()):
            for page in filter(None, self._blocks.pop(key).pages):
                if page in self._idle:
                    del self._idle[page], self._uses[page]
                    self._pages.release(CACHE, (page,))
                else:
                    self._uses[page].key = None

    def check(self, held: Iterable[tuple[User, int]]) -> None:
        """AssertionError unless the books agree with each other and with `held`, every page of every sequence."""
        holders: dict[int, list[User]] = {}
        for user, page in held:
            if page in self._uses:
                holders.setdefault(page, []).append(user)
        for page, use in self._uses.items():
            assert self._pages.owner_of(page) == CACHE, f"page {page} is not the cache's"
            assert set(map(id, use.users)) == set(map(id, holders.get(page, []))), f"page {page} has other users"
            assert (page in self._idle) == (not use.users), f"page {page} waits for eviction and has users"
            assert use.key is None or self._blocks[use.key].pages[use.group] == page, f"page {page} is not at its key"
        shared = [p for p, use in self._uses.items() if len(use.users) > 1 and use.group in self._full]
        assert len(shared) == self.shared_pages, "the count of shared pages is wrong"
        for user in {id(user): user for users in holders.values() for user in users}.values():
            assert user.shared == sum(any(u is user for u in self._uses[p].users) for p in shared), "a count is wrong"
        assert self._pages.owned(CACHE) == len(self._uses), "the allocator counts other cached pages"
        assert {k for keys in self._versions.values() for k in keys} == self._blocks.keys(), "keys and versions differ"
        assert sum(1 for b in self._blocks.values() for p in b.pages if p) == sum(
            use.key is not None for use in self._uses.values()
        ), "blocks and pages differ"

    def _now_shared(self, use: _Use) -> None:
        """The last of its users has just joined the others."""
        use.users[-1].shared += 1
        if len(use.users) == 2:
            self.shared_pages += 1
            use.users[0].shared += 1

    def _present(self, keys: Sequence[bytes]) -> int:
        """Leading blocks that are held in all full groups, or, where there are none, known at all."""
        for count, key in enumerate(keys):
            block = self._blocks.get(key)
            if self._full and (block is None or not all(block.pages[g] for g in self._full)):
                return count
        return len(keys)

    def _run_lengths(self, keys: Sequence[bytes], group: int) -> list[int]:
        """For each block, how many in a row up to it are held in the group."""
        runs, run = [], 0
        for key in keys:
            block = self._blocks.get(key)
            run = run + 1 if block is not None and block.pages[group] else 0
            runs.append(run)
        return runs

    def _forget(self, page: int) -> None:
        use = self._uses.pop(page)
        assert use.key is not None
        block = self._blocks[use.key]
        block.pages[use.group] = 0
        if not any(block.pages):
            del self._blocks[use.key]
            keys = self._versions[block.version]
            keys.remove(use.key)
            if not keys:
                del self._versions[block.version]
        self._pages.release(CACHE, (page,))
