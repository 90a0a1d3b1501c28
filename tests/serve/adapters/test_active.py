"""The active set: rows with adapters of every kind side by side, against PEFT and transformers one at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.methods.peft_oracle import base
from tests.serve.adapters.kit import ALL, FAMILY, OWN, PEFT, Case, case, run
from tests.sharding.collectives import collectives
from tests.tiny import assert_close, logits, tiny, tokens

from jora.models import decoder
from jora.models.adapted import BASE, Rows
from jora.models.model import Model
from jora.serve.adapters.active import Active, PartShape, new_active, part, window, windows
from jora.serve.adapters.active_set import ActiveSet, Member, Size
from jora.serve.adapters.joining import join, join_shapes, leave, warm_up
from jora.serve.adapters.packing import Spec, pack, spec_of
from jora.serve.adapters.projection import Expanded
from jora.serve.pages.layout import PoolLayout

TARGETS = tuple(ALL)
RANKS, PRODUCTS, EXTRA = 64, 6, 8
NAMES = [*PEFT, *OWN]
IDS = tokens(batch=len(NAMES) + 2, length=9)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: case(name, base(FAMILY), tmp_path_factory.mktemp("adapter")) for name in NAMES}


class Serving:
    """A pool with the cases' pages in it, in no order, and an active set they join."""

    def __init__(self, cases: dict[str, Case], mesh: str | None = None) -> None:
        self.model = model = base(FAMILY, mesh)
        self.pages = PoolLayout.of(model.config, model.layout, "float32", 4)
        self.specs: dict[str, Spec] = {}
        self.places: dict[str, list[int]] = {}
        streams = {}
        for name, one in cases.items():
            served = one.adapter.method.lower(one.adapter, base(FAMILY))
            self.specs[name] = spec_of(served)
            streams[name] = pack(served, model.config, model.layout, "float32")
        counts = {name: self.pages.adapter_pages(stream.shape[1]) for name, stream in streams.items()}
        total = 1 + sum(counts.values())
        free = (np.random.default_rng(0).permutation(total - 1) + 1).tolist()
        # Pages hold what others left there; numbers of a stream's last page behind its end too.
        pool = np.full((total, self.pages.shards, self.pages.elements), 1e30, np.float32)
        for name, stream in streams.items():
            self.places[name] = [free.pop() for _ in range(counts[name])]
            padded = np.full((stream.shape[0], counts[name] * self.pages.elements), 1e30, np.float32)
            padded[:, : stream.shape[1]] = stream
            parts = padded.reshape(stream.shape[0], counts[name], -1)
            pool[self.places[name]] = np.moveaxis(parts, 1, 0)
        sharding = self.pages.new_pool(1, model.layout).sharding
        self.pool = jax.device_put(pool, sharding)
        self.set = ActiveSet([RANKS], [PRODUCTS])
        self.active = self.new(Size(0, 0))

    def new(self, size: Size) -> Active:
        return new_active(self.model.config, self.model.layout, TARGETS, *size, "float32")

    def update(self, names: Sequence[str]) -> None:
        update = self.set.update({name: self.specs[name] for name in names})
        if update.rebuild is not None:
            self.active = self.new(update.rebuild)
        for number in update.leave:
            self.active = leave(self.active, number)
        for member in update.join:
            self.join(member)

    def join(self, member: Member) -> None:
        name = str(member.version)
        model, pages = self.model, self.places[name]
        self.active = join(
            self.active, self.pool, pages, member.spec, member.place, model.config, model.layout, self.pages
        )

    def decode(self, rows: Sequence[str | None], ids: np.ndarray, products: bool = True) -> np.ndarray:
        numbers = self.set.numbers(rows)
        expanded = Expanded(*self.set.expanded(rows, EXTRA)) if products else None
        return run(self.model, lambda a, n, e: a.bind_decode(n, e), ids, self.active, numbers, expanded)

    def prefill(self, row: str, ids: np.ndarray) -> np.ndarray:
        """One adapter, out of windows at the end of the set (where they begin before its own) or not."""
        place, spec = self.set.members[row].place, self.specs[row]
        shape = PartShape(window(self.set.size.ranks, spec.rank) if spec.rank else 0, spec.products)
        own = part(self.active, place.rank, place.vector, shape=shape)
        products = np.arange(spec.products, dtype=np.int32)
        expanded = Expanded(products, np.zeros(spec.products - 1, np.int32)) if spec.products else None  # type: ignore
        arrays = (own, np.array([place.number], np.int32), expanded)
        return run(self.model, lambda a, n, e: a.bind_decode(n, e), ids[None], *arrays)[0]


@pytest.fixture(scope="module")
def serving(cases: dict[str, Case]) -> Serving:
    serving = Serving(cases)
    serving.update(NAMES)
    return serving


def test_each_row_is_the_model_with_its_own_adapter(serving: Serving, cases: dict[str, Case]) -> None:
    rows = [None, *NAMES, "flora"]
    found = serving.decode(rows, IDS)
    plain = logits(tiny(FAMILY)[0], IDS[:1])
    assert_close(found[:1], plain)
    for number, name in enumerate(rows):
        if name is not None:
            expected = cases[name].expected(IDS[number : number + 1])
            assert_close(found[number : number + 1], expected)
            assert np.abs(expected - logits(tiny(FAMILY)[0], IDS[number : number + 1])).max() > 0.1 * expected.std()


@pytest.mark.parametrize("name", NAMES)
def test_prefill_takes_the_ranks_of_one_adapter(serving: Serving, cases: dict[str, Case], name: str) -> None:
    assert_close(serving.prefill(name, IDS[0])[None], cases[name].expected(IDS[:1]))


def test_adapters_come_and_go(cases: dict[str, Case]) -> None:
    serving = Serving(cases)
    low_rank = [name for name in NAMES if not serving.specs[name].products]
    for wanted in (["rank 6"], ["rank 6", "nola", "dora"], ["per-head", "rank 1"], low_rank, NAMES, ["flora", "ia3"]):
        serving.update(wanted)
        rows = [*wanted, None]
        products = any(serving.specs[name].products for name in wanted)
        found = serving.decode(rows, IDS[: len(rows)], products)
        for number, name in enumerate(wanted):
            assert_close(found[number : number + 1], cases[name].expected(IDS[number : number + 1]))
        assert_close(found[-1:], logits(tiny(FAMILY)[0], IDS[len(rows) - 1 : len(rows)]))


@pytest.mark.parametrize("mesh", [pytest.param("tensor=2", marks=pytest.mark.slow), "tensor=4"])
def test_meshes_agree(cases: dict[str, Case], serving: Serving, mesh: str) -> None:
    cut = Serving(cases, mesh)
    cut.update(NAMES)
    rows = [None, *NAMES, "flora"]
    assert_close(cut.decode(rows, IDS), serving.decode(rows, IDS))
    for name in ("rank 6", "flora"):
        assert_close(cut.prefill(name, IDS[1]), serving.prefill(name, IDS[1]))


def factors(active: Active, name: str, target: str) -> np.ndarray:
    """A or B of a target, [L, R, *features]."""
    if name == "b":
        return np.asarray(active.b[target])
    [(group, a)] = [(group, a) for group, a in active.a.items() if target in group]
    return np.moveaxis(np.asarray(a)[..., group.index(target), :], -1, 1)


def test_what_joins_is_what_was_packed(cases: dict[str, Case], serving: Serving) -> None:
    """To the bit, zeros where a target has fewer ranks; others' ranks and free ones stay as they are."""
    serving = Serving(cases)
    serving.update(["rank 6", "rank 1", "flora"])
    before = jax.tree.map(np.array, serving.active)
    serving.update(["rank 6", "rank 1", "flora", "rslora 9"])
    after, place = serving.active, serving.set.members["rslora 9"].place
    served = cases["rslora 9"].adapter.method.lower(cases["rslora 9"].adapter, serving.model)
    own = slice(place.rank, place.rank + 9)
    for target in TARGETS:
        for name in "ab":
            old, new = factors(before, name, target), factors(after, name, target)
            expected = getattr(served.low_rank[target], name) if target in served.low_rank else 0
            np.testing.assert_array_equal(new[:, own], np.broadcast_to(expected, new[:, own].shape))
            np.testing.assert_array_equal(np.delete(new, own, 1), np.delete(old, own, 1))
    owner = np.asarray(after.owner)
    assert (owner[own] == place.number).all()
    np.testing.assert_array_equal(np.delete(owner, own), np.delete(before.owner, own))
    flora = serving.set.members["flora"].place.vector
    np.testing.assert_array_equal(after.u["k_proj"][:, flora : flora + 3, 0], [[1, 0, 0]] * 2)
    np.testing.assert_array_equal(after.u["k_proj"][:, 0], 1)


def test_nothing_compiles_after_warm_up(cases: dict[str, Case]) -> None:
    """Whatever joins and leaves; nor does what reads the set, which has one form of sharding."""
    serving = Serving(cases)
    model = serving.model
    serving.set.size = Size(RANKS, PRODUCTS)
    parts = (model.config, model.layout, serving.pages)
    empty = serving.new(serving.set.size)
    shardings = jax.tree.map(lambda x: x.sharding, empty)
    serving.active = warm_up(empty, serving.pool, *parts)
    assert len(join_shapes(serving.active, *parts)) == 2 * len(windows(RANKS)) == 6
    assert (np.asarray(serving.active.owner) == -1).all()
    compiled: list[str] = []

    def count(event: str, seconds: float, **_: Any) -> None:
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(count)
    serving.new(serving.set.size)  # as a rebuild does
    for name in NAMES:
        serving.update([name])
    serving.update(NAMES)
    for member in list(serving.set.members.values()):
        serving.active = leave(serving.active, member.place.number)
    jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, serving.active, shardings))
    assert (np.asarray(serving.active.owner) == -1).all()


def test_ranks_that_no_row_asks_for_do_nothing_whatever_they_hold(serving: Serving) -> None:
    """Another adapter's large numbers: a product by zero would not be enough."""
    huge = jax.tree.map(lambda x: x, serving.active)
    place = serving.set.members["rank 6"].place
    a = {group: x.at[..., place.rank].set(3e38) for group, x in serving.active.a.items()}
    huge = Active(a, huge.b, huge.u, huge.v, huge.owner, huge.scales_bias)
    numbers = serving.set.numbers([None, "nola"])
    found = run(serving.model, lambda a, n: a.bind_decode(n), IDS[:2], huge, numbers)
    assert_close(found, run(serving.model, lambda a, n: a.bind_decode(n), IDS[:2], serving.active, numbers))


def compiled(model: Model, bind: Any, *arrays: Any) -> str:
    """The text of a forward pass, not optimised beyond what is needed."""

    def forward(params: Any, ids: Any, arrays: Any) -> Any:
        return decoder.forward(params, model.config, model.layout, ids, bound=bind(*arrays), rows=Rows())[0]

    lowered = jax.jit(forward).lower(model.params, jnp.asarray(IDS), arrays)
    return lowered.compile({"xla_backend_optimization_level": "0"}).as_text()


@pytest.mark.parametrize("mesh", [None, "tensor=4"])
def test_targets_that_read_the_same_share_one_product(cases: dict[str, Case], mesh: str | None) -> None:
    """A layer has four products with A, for q, k, v, for o, for gate, up and for down, and seven with B."""
    serving = Serving(cases, mesh)
    serving.update(NAMES)
    numbers = serving.set.numbers([None, *NAMES, "flora"])
    plain, adapted = (
        len(re.findall(r" dot\(", text))
        for text in (
            compiled(serving.model, lambda: BASE),
            compiled(serving.model, lambda a, n: a.bind_decode(n), serving.active, numbers),
        )
    )
    assert adapted - plain == 4 + 7


def test_devices_exchange_ranks_of_tokens_alone(cases: dict[str, Case]) -> None:
    """Two linears a layer have a cut input; their inner products, [rows, tokens, rank], are all that is added."""
    serving = Serving(cases, "tensor=4")
    serving.update(NAMES)
    rows = [None, *NAMES, "flora"]
    numbers, expanded = serving.set.numbers(rows), Expanded(*serving.set.expanded(rows, EXTRA))
    plain = collectives(compiled(serving.model, lambda: BASE))
    for each in (None, expanded):
        bound = compiled(serving.model, lambda a, n, e: a.bind_decode(n, e), serving.active, numbers, each)
        extra = collectives(bound) - plain
        assert {item.shape for item in extra} == {(len(rows), IDS.shape[1], 1, RANKS)}, extra
        # o_proj's input is cut along two mesh axes, over which the compiler sums one after the other.
        assert sum(extra.values()) <= 3 * serving.model.config.layers
