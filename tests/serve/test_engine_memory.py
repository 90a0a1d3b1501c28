"""What the engine makes of its memory: a pool smaller than the context, and nothing left of what was unloaded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serve.bases import base, randomised
from tests.serve.engines import OPTIONS, QV, Reference, ask, no_adapter_is_left, prompt, run, serving, step, tokens

import jora
from jora.cli.serve_command import Options, start_engine
from jora.errors import InputError
from jora.reporting import Silent
from jora.serve.engine import SMALL, Engine
from jora.serve.pages.layout import PoolLayout

POSITIONS = 1024  # of the base


def pool_of(pages: int) -> int:
    """Bytes of a pool of so many pages, page 0 included."""
    model = base()
    return pages * PoolLayout.of(model.config, model.layout, model.dtype, OPTIONS.page_tokens).page_bytes


@pytest.mark.parametrize("optimistic", [False, True])
@pytest.mark.parametrize("adapter", [None, "eight", "soft"])
def test_a_request_without_a_length_gets_what_the_pool_holds(
    shelf: Path, adapter: str | None, optimistic: bool
) -> None:
    with serving(shelf, pool_bytes=pool_of(300), max_length=None, optimistic=optimistic) as engine:
        assert SMALL < engine.max_length < POSITIONS
        assert engine.executor.tables.shape[2] == engine.pool_layout.blocks(engine.max_length + 1)
        pages = 0
        if adapter is not None:
            pages = engine.host.fetch(engine.catalogue.resolve(adapter)).pages
        engine.submit(ask("a", prompt(0, 5), adapter, max_tokens=None))
        [sequence] = engine._live
        need = engine.scheduler._footprint.most(sequence) + pages
        assert 0 <= engine.pages.total - 1 - need < len(engine.pool_layout.groups)
        sequence.ready = True
        assert engine.scheduler.plan().admitted == [sequence]
        engine.cancel("a")


def test_a_length_that_the_pool_does_not_hold_is_refused(shelf: Path) -> None:
    with serving(shelf, pool_bytes=pool_of(300), max_length=None) as engine:
        longest = engine.max_length
        with pytest.raises(InputError, match=f"more than {longest} positions"):
            engine.submit(ask("a", prompt(0, 5), max_tokens=longest))
        with pytest.raises(InputError, match="the pool has 299: ask for fewer"):  # beside its adapter
            engine.submit(ask("a", prompt(0, 5), "eight", max_tokens=longest - 5))
        with pytest.raises(InputError, match="the pool has 299: ask for fewer"):
            engine.submit(ask("a", prompt(0, longest - 1), "eight", max_tokens=None))
        engine.submit(ask("a", prompt(0, 5), max_tokens=longest - 5))
        engine.cancel("a")


def test_a_pool_for_nothing_is_refused_in_a_line(shelf: Path) -> None:
    with (
        pytest.raises(InputError, match="tokens at most, which is too few") as refused,
        serving(shelf, pool_bytes=pool_of(4)),
    ):
        pass
    assert "\n" not in str(refused.value)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(("pages", "warned"), [(300, True), (3000, False)])
def test_a_short_pool_is_told_at_start(monkeypatch: pytest.MonkeyPatch, pages: int, warned: bool) -> None:
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(Engine, "warm_up", lambda self, reporter: None)
    options, reporter = Options(model="m"), Notes()
    engine_options: Any = OPTIONS.__class__(pool_bytes=pool_of(pages), page_tokens=OPTIONS.page_tokens, chunk=16)
    running, _ = start_engine(base(), options, engine_options, reporter)
    running.stop()
    running.engine.close()
    assert [f"{running.engine.max_length} tokens at most, not {POSITIONS}" in note for note in reporter.notes] == (
        [True] if warned else []
    )


def test_unloaded_adapters_leave_the_active_set(engine: Engine, reference: Reference) -> None:
    for number in range(4):
        for directory in ("soft", "one", "three"):
            name = f"{directory}-{number}"
            engine.load_adapter(name, directory)
            run(engine, ask("a", prompt(number, 5), name, max_tokens=2))
            engine.unload_adapter(name)
        assert not engine._active_set.members
        # Its number is free again, and no rank may be taken for its successor's.
        assert (np.asarray(engine.executor.active.owner) == -1).all()
        assert tokens(run(engine, ask("b", prompt(3, 7), "two"))["b"]) == reference("two", prompt(3, 7))
        engine.executor.deactivate(engine.catalogue.resolve("two"))
    engine.unload_adapter("two")
    no_adapter_is_left(engine)


def test_an_adapter_that_is_unloaded_while_it_runs_leaves_with_its_last_row(
    engine: Engine, reference: Reference
) -> None:
    engine.load_adapter("it", "two")
    engine.submit(ask("a", prompt(3, 7), "it"))
    while not engine.scheduler.running_count:
        step(engine)
    step(engine)
    engine.unload_adapter("it")
    assert [version.name for version in engine._active_set.members] == ["it"]
    assert tokens(run(engine)["a"])[-1] == reference("two", prompt(3, 7))[-1]
    no_adapter_is_left(engine)


def test_more_rows_of_an_adapter_take_the_next_product_bucket(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    """fLoRA has several base products a row: they may need a larger program than its vectors alone."""
    jora.save_adapter(randomised(jora.FLoRA(rank=4, targets=QV), base(), 3), tmp_path / "flora")
    engine, expected = engine_of(tmp_path, product_buckets=(4, 16)), Reference(tmp_path)
    asked = {f"{number}": prompt(number, 6) for number in range(4)}
    engine.submit(ask("0", asked["0"], "flora", max_tokens=12))
    events = {name: [] for name in asked}
    while not events["0"]:
        events["0"] += step(engine)
    assert engine._active_set.size.products == 4
    for name, found in run(engine, *(ask(name, asked[name], "flora", max_tokens=12) for name in "123")).items():
        events[name] += found
    assert engine._active_set.size.products == 16
    for name, found in events.items():
        assert tokens(found) == expected("flora", asked[name], 12)
