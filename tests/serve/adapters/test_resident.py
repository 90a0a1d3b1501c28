"""Adapters in the pool: pages, eviction, pins, and nothing left of what was unloaded."""

from __future__ import annotations

import gc
import resource
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.adapters.shelf import LIMITS, Shelf, Slow, base, load_named, pool_layout, save, shelf

import jora
from jora.errors import InputError
from jora.serve.adapters.active_set import ActiveSet
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.host_store import HostStore
from jora.serve.adapters.loading import Loader
from jora.serve.adapters.pool_writes import PAGES, _write, write_pages
from jora.serve.adapters.resident import Resident
from jora.serve.pages.allocator import NOBODY, Pages
from jora.serve.pages.layout import PoolLayout
from jora.serve.requests import UnknownAdapter
from jora.serve.scheduling.plan import AdapterResidency
from jora.serve.scheduling.sequence import AdapterVersion
from jora.sharding import build_layout, parse_mesh


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(tmp_path / "a")
    for name in "bcd":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    return tmp_path


def resident(parts: Shelf, name: str) -> AdapterVersion:
    """Load an adapter and give it pages."""
    version = parts.catalogue.resolve(name)
    parts.host.fetch(version)
    assert parts.resident.make_resident(version)
    return version


def in_pool(parts: Shelf) -> int:
    return parts.pages.by_kind()["adapter"]


def test_it_is_what_the_scheduler_asks_for(directory: Path) -> None:
    with shelf(directory) as parts:
        asked: AdapterResidency = parts.resident
        version = parts.catalogue.resolve("a")
        assert asked.status(version) == "absent"
        assert not asked.make_resident(version)  # not loaded: begins to
        parts.host.fetch(version)
        assert asked.status(version) == "host"
        needed = asked.pages_needed(version)
        assert asked.make_resident(version)
        assert asked.status(version) == "resident"
        assert len(parts.resident.pages_of(version)) == needed == parts.pages.owned(("adapter", version))
        assert asked.evictable_pages() == needed
        parts.pages.check()


def test_pages_needed_is_known_before_it_is_loaded(directory: Path) -> None:
    with shelf(directory) as parts:
        version = parts.catalogue.resolve("a")
        before = parts.resident.pages_needed(version)
        assert before == parts.host.fetch(version).pages > 0
        assert parts.host.counts.loads == 1


def test_copies_are_handed_out_once_and_fill_the_pages(directory: Path) -> None:
    layout = pool_layout(base())
    with shelf(directory) as parts:
        versions = [resident(parts, name) for name in "ab"]
        pool = layout.new_pool(40, base().layout) + 7
        copies = parts.resident.take_copies()
        assert [copy.version for copy in copies] == versions and parts.resident.take_copies() == []
        for copy in copies:
            pool = write_pages(pool, copy.pages, copy.blocks, base().layout)
        for version in versions:
            blocks = parts.host.fetch(version).blocks
            np.testing.assert_array_equal(pool[np.array(parts.resident.pages_of(version))], blocks)
        used = [NOBODY, *(page for copy in copies for page in copy.pages)]
        assert (np.delete(np.asarray(pool), used, axis=0) == 7).all()


def test_the_writing_program_is_one_for_all_sizes() -> None:
    devices = build_layout(parse_mesh("tensor=2"), base().config.kv_heads)
    layout = PoolLayout.of(base().config, devices, "float32", page_tokens=4)
    programs = cast(Any, _write)  # jit's own books have no types
    programs.clear_cache()
    pool = layout.new_pool(200, devices)
    draw = np.random.default_rng(0)
    written: dict[int, np.ndarray] = {}
    for start, count in ((1, 1), (5, PAGES), (60, 2 * PAGES + 3)):
        blocks = draw.standard_normal((count, layout.shards, layout.elements)).astype(np.float32)
        pages = [int(page) for page in draw.permutation(np.arange(start, start + count))]
        pool = write_pages(pool, pages, blocks, devices)
        written |= dict(zip(pages, blocks, strict=True))
    assert programs._cache_size() == 1
    found = np.asarray(pool)
    for page in range(1, 200):
        np.testing.assert_array_equal(found[page], written.get(page, np.zeros_like(found[page])))


def made_up(directory: Path, total: int, ranks: int = 100) -> tuple[Resident, Pages]:
    """Residency of adapters of 5 pages each, without files of their own."""
    catalogue = Catalogue(directory, base().config, base().identity)
    loader = Loader(catalogue, base(), pool_layout(base()), LIMITS)
    books = Pages(total)
    return Resident(catalogue, loader, HostStore(Slow(500), 1 << 20), books, ActiveSet((ranks,))), books


def put(adapters: Resident, name: str) -> AdapterVersion:
    version = AdapterVersion(name, 1)
    adapters._host.fetch(version)
    adapters.make_resident(version)
    return version


def test_the_least_recently_used_goes_first_and_a_pinned_one_never(directory: Path) -> None:
    adapters, books = made_up(directory, 16)  # three of 5 pages, and page 0
    a, b, c = (put(adapters, name) for name in "abc")
    adapters.make_resident(a)  # used again
    adapters.pin(c)
    d = put(adapters, "d")
    assert [adapters.status(v) for v in (a, b, c, d)] == ["resident", "host", "resident", "resident"]
    put(adapters, "e")
    assert adapters.status(a) != "resident" and adapters.status(c) == "resident"
    adapters.pin(d)
    adapters.pin(AdapterVersion("e", 1))
    assert adapters.evictable_pages() == 0
    assert not adapters.make_resident(put(adapters, "f"))
    adapters.unpin(c)
    assert adapters.make_resident(AdapterVersion("f", 1)) and adapters.status(c) != "resident"
    books.check()


def test_an_evicted_adapter_is_not_copied(directory: Path) -> None:
    adapters, _ = made_up(directory, 6)
    put(adapters, "a")
    b = put(adapters, "b")
    assert [copy.version for copy in adapters.take_copies()] == [b]


def test_others_may_take_an_idle_adapters_pages(directory: Path) -> None:
    adapters, books = made_up(directory, 11)
    a, b = put(adapters, "a"), put(adapters, "b")
    adapters.pin(b)
    books.allocate(("kv", "x"), 3)  # asks the residency, which gives up a
    assert adapters.status(a) == "host" and adapters.status(b) == "resident"
    books.check()


def test_the_active_sets_capacity_decides_who_runs_together(directory: Path) -> None:
    adapters, _ = made_up(directory, 40, ranks=5)  # made-up adapters have rank 2
    a, b, c = (put(adapters, name) for name in "abc")
    assert adapters.can_activate(b, [a])
    assert adapters.can_activate(a, [a, a, b])
    assert not adapters.can_activate(c, [a, b])


def test_an_unload_frees_all_at_once_where_nothing_runs(directory: Path) -> None:
    with shelf(directory) as parts:
        version = resident(parts, "a")
        parts.catalogue.unload("a")
        parts.resident.retire()
        assert parts.retired == [version]
        assert in_pool(parts) == 0 and parts.host.nbytes == 0 and parts.resident.take_copies() == []
        with pytest.raises(UnknownAdapter):
            parts.catalogue.entry(version)
        parts.pages.check()


def test_what_runs_finishes_on_its_version_and_then_it_is_freed(directory: Path) -> None:
    with shelf(directory) as parts:
        old = resident(parts, "a")
        parts.resident.hold(old)
        parts.resident.pin(old)
        held = in_pool(parts)
        save(directory / "a", seed=1)
        new = resident(parts, "a")
        parts.resident.retire()
        assert new != old and parts.retired == [old]
        assert in_pool(parts) == 2 * held and parts.resident.status(old) == "resident"
        blocks = {copy.version: copy.blocks for copy in parts.resident.take_copies()}
        assert not np.array_equal(blocks[old], blocks[new])
        parts.resident.unpin(old)
        assert in_pool(parts) == 2 * held  # the request still holds it: it may have been preempted
        parts.resident.release(old)
        assert in_pool(parts) == held and parts.resident.status(old) == "absent"
        assert parts.host.peek(old) is None
        parts.pages.check()


def test_a_replaced_version_is_never_found_again(directory: Path) -> None:
    with shelf(directory) as parts:
        seen = set()
        for _ in range(5):
            version = load_named(parts, "a", "a")
            assert parts.catalogue.resolve("a") == version not in seen
            seen.add(version)
            parts.catalogue.unload("a")
            parts.resident.retire()


def test_a_failed_load_is_told_and_takes_nothing(directory: Path) -> None:
    (directory / "a" / "adapter_model.safetensors").write_bytes(b"no")
    with shelf(directory) as parts:
        version = parts.catalogue.resolve("a")
        assert not parts.resident.make_resident(version)
        with pytest.raises(InputError):
            parts.host.fetch(version)
        assert parts.resident.status(version) == "absent" and in_pool(parts) == 0
        assert "safetensors" in str(parts.host.failure(version))


OPERATIONS = st.lists(st.tuples(st.sampled_from(["put", "pin", "unpin", "kv", "free"]), st.integers(0, 5)), max_size=60)


@given(OPERATIONS)
@settings(max_examples=30, deadline=None)
def test_books_hold_and_pins_keep_under_any_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    adapters, books = made_up(tmp_path_factory.getbasetemp(), 22)
    pinned: set[AdapterVersion] = set()
    taken: list[list[int]] = []
    for what, number in steps:
        version = AdapterVersion(str(number), 1)
        if what == "put":
            put(adapters, str(number))
        elif what == "pin" and adapters.status(version) == "resident" and version not in pinned:
            adapters.pin(version)
            pinned.add(version)
        elif what == "unpin" and version in pinned:
            adapters.unpin(version)
            pinned.remove(version)
        elif what == "kv" and books.available >= number:
            taken.append(books.allocate(("kv", 0), number))
        elif what == "free" and taken:
            books.release(("kv", 0), taken.pop())
        books.check()
        assert all(adapters.status(version) == "resident" for version in pinned)
        live = {page for copy in adapters.take_copies() for page in copy.pages}
        assert all(str(books.owner_of(page)).startswith("('adapter'") for page in live)
        owned = books.by_kind()["adapter"]
        assert adapters.evictable_pages() == owned - 5 * len(pinned)
    adapters._host.close()


class Grown(NamedTuple):
    """Bytes more than at a quarter of the way: of the process, and of what Python allocated since then and holds."""

    process: int
    held: int


def resident_bytes() -> int:
    """Memory of this process now (`getrusage` knows only the most that it ever had)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def cycles(directory: Path, count: int) -> Grown:
    """Load, use, replace and unload adapters under ever new names, a soft prompt among them."""
    save(directory / "s", jora.PromptTuning(prompt_tokens=3))
    retired = early = 0
    with shelf(directory, host_bytes=1 << 16) as parts:
        for number in range(count):
            if number == count // 4:
                gc.collect()
                early = resident_bytes()
                tracemalloc.start()
            version = load_named(parts, f"n{number // 2}", "abcds"[number % 5])
            parts.resident.hold(version)
            assert parts.resident.make_resident(version)
            parts.resident.pin(version)
            parts.resident.take_copies()
            parts.active.update({version: parts.resident.spec(version)})
            if number % 2:
                parts.catalogue.unload(version.name)
            parts.resident.retire()
            parts.resident.unpin(version)
            parts.resident.release(version)
            assert len(parts.active.members) <= 2 and len(parts.host) <= 2
            retired += len(parts.retired)
            parts.retired.clear()
        assert retired == count
        for books in (parts.catalogue, parts.resident, parts.host, parts.active):
            held = {name: len(each) for name, each in vars(books).items() if isinstance(each, dict | list | set)}
            assert {name for name, size in held.items() if size} <= {"_identity"}, held
        assert in_pool(parts) == 0 and parts.host.nbytes == 0
        parts.pages.check()
        gc.collect()
        grown = Grown(resident_bytes() - early, tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    return grown


def test_nothing_is_left_after_many_loads_and_unloads(directory: Path) -> None:
    cycles(directory, 100)


@pytest.mark.slow
def test_ten_thousand_loads_and_unloads_keep_memory_flat(directory: Path) -> None:
    grown = cycles(directory, 10_000)
    assert grown.held < 1 << 19, f"{grown.held / 2**20:.1f} MiB more of Python's"
    assert grown.process < 20 << 20, f"{grown.process / 2**20:.0f} MiB more"


def test_requests_for_the_base_need_no_adapter_directory() -> None:
    with pytest.raises(UnknownAdapter):
        Catalogue(None, base().config, base().identity).resolve("a")


def test_use_counts_until_it_ends(tmp_path: Path) -> None:
    adapters, _ = made_up(tmp_path, 16)
    a, b, c = (put(adapters, name) for name in "abc")
    for version in (a, b, c):
        adapters.pin(version)
    for version in (c, b, a):
        adapters.unpin(version)
    adapters.evict(1)
    assert [adapters.status(version) == "resident" for version in (a, b, c)] == [True, True, False]
    adapters._host.close()


def test_a_retired_one_that_is_still_waited_for_goes_last(directory: Path) -> None:
    with shelf(directory) as parts:
        old = resident(parts, "a")
        parts.resident.hold(old)
        parts.catalogue.unload("a")
        parts.resident.retire()
        other = resident(parts, "b")
        parts.resident.evict(1)
        assert (parts.resident.status(old), parts.resident.status(other)) == ("resident", "host")
