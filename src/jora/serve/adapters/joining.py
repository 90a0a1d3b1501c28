"""How an adapter comes into the active set: from its pages of the pool, by programs that fit every adapter.

Ranks, base products and where they go are data. What a program is compiled for is the active set's own size and how
many ranks it writes at once (`windows`), so warm-up can compile all of them (`join_shapes`).

Shape legend: L layers, R ranks, S vectors, T targets, n pages, w ranks or vectors written at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jora.models.config import LINEARS, ModelConfig
from jora.serve.adapters.active import Active, active_shardings, window, windows
from jora.serve.adapters.packing import Spec, TargetSpec, elements
from jora.serve.pages.layout import POOL_AXES, PoolLayout
from jora.sharding import Layout


class Place(NamedTuple):
    """Where an adapter goes in the active set: its number, its first rank and its first vector (1 at least)."""

    number: int
    rank: int
    vector: int


class JoinShape(NamedTuple):
    """What a join program is compiled for besides the active set: ranks and vectors written, and pages read."""

    ranks: int
    vectors: int
    pages: int


class _Program(NamedTuple):
    """The static part of a join; hashable. The active set's targets, ranks and vectors stand at the end."""

    config: ModelConfig
    layout: Layout
    shape: JoinShape
    targets: tuple[str, ...]
    ranks: int
    vectors: int

    @classmethod
    def of(cls, active: Active, shape: JoinShape, config: ModelConfig, layout: Layout) -> _Program:
        return cls(config, layout, shape, _targets(active), active.ranks, active.vectors)

    @property
    def shardings(self) -> Any:
        return active_shardings(self.config, self.layout, self.targets, self.ranks, self.vectors)


class _Data(NamedTuple):
    """An adapter as a program gets it: numpy arrays and scalars outside, traced ones inside.

    ranks, products: int32 [T], of each target of the active set; then `Place`'s numbers and `Spec.scales_bias`.
    """

    ranks: Any
    products: Any
    number: Any
    rank: Any
    vector: Any
    scales_bias: Any


def join(
    active: Active,
    pool: Float[Array, "pages shards elements"],
    pages: Sequence[int],
    spec: Spec,
    place: Place,
    config: ModelConfig,
    layout: Layout,
    pool_layout: PoolLayout,
) -> Active:
    """`active` (donated) with one adapter copied from its pages of the pool; other adapters' ranks stay."""
    if not spec.targets:  # a soft prompt alone
        return active
    shape = join_shape(active, spec, config, layout, pool_layout)
    by_target = {each.target: each for each in spec.targets}
    sizes = [by_target.get(target, TargetSpec(target, 0, 0)) for target in _targets(active)]
    numbers = np.array([(each.rank, each.products) for each in sizes], np.int32).reshape(-1, 2)
    ids = np.zeros(shape.pages, np.int32)
    ids[: len(pages)] = pages
    number, rank, vector = (np.int32(x) for x in place)
    data = _Data(numbers[:, 0], numbers[:, 1], number, rank, vector, np.bool_(spec.scales_bias))
    return _joined(_Program.of(active, shape, config, layout))(active, pool, ids, data)


def join_shape(active: Active, spec: Spec, config: ModelConfig, layout: Layout, pool_layout: PoolLayout) -> JoinShape:
    """The program that copies an adapter of these sizes into `active`."""
    ranks = window(active.ranks, spec.rank)
    return _shape(active, ranks, active.vectors - 1 if spec.products else 0, config, layout, pool_layout)


def join_shapes(active: Active, config: ModelConfig, layout: Layout, pool_layout: PoolLayout) -> list[JoinShape]:
    """Every program that `join` may need for this active set, whatever adapters come."""
    products = (0, active.vectors - 1) if active.vectors else (0,)
    return [
        _shape(active, ranks, vectors, config, layout, pool_layout)
        for ranks in windows(active.ranks) or (0,)
        for vectors in products
        if ranks or vectors
    ]


def warm_up(active: Active, pool: Array, config: ModelConfig, layout: Layout, pool_layout: PoolLayout) -> Active:
    """Compile every join of this active set, which must be empty, and `leave`; gives it back, empty as it was."""
    sizes = np.zeros(len(_targets(active)), np.int32)
    nothing = _Data(sizes, sizes, np.int32(0), np.int32(0), np.int32(1), np.bool_(False))
    for shape in join_shapes(active, config, layout, pool_layout):
        ids = np.zeros(shape.pages, np.int32)
        active = _joined(_Program.of(active, shape, config, layout))(active, pool, ids, nothing)
    return leave(active, 0)


def _shape(
    active: Active, ranks: int, vectors: int, config: ModelConfig, layout: Layout, pool_layout: PoolLayout
) -> JoinShape:
    largest = Spec(tuple(TargetSpec(target, ranks, vectors) for target in _targets(active)))
    return JoinShape(ranks, vectors, pool_layout.adapter_pages(elements(largest, config, layout)))


def _targets(active: Active) -> tuple[str, ...]:
    """In the stream's order (a dictionary that went through a program has its keys sorted)."""
    return tuple(target for target in LINEARS if target in active.b or target in active.u)


def leave(active: Active, number: int) -> Active:
    """`active` (its owners donated) without an adapter: its ranks are nobody's."""
    return replace(active, owner=_without(active.owner.sharding)(active.owner, np.int32(number)))


@lru_cache(maxsize=64)
def _without(sharding: Any) -> Callable[[Array, Any], Array]:
    def without(owner: Int[Array, " R"], number: Int[Array, ""]) -> Int[Array, " R"]:
        return jnp.where(owner == number, -1, owner)

    return jax.jit(without, donate_argnums=0, out_shardings=sharding)


@lru_cache(maxsize=256)
def _joined(program: _Program) -> Callable[[Active, Array, np.ndarray, _Data], Active]:
    local = partial(_join_local, program=program)
    shardings, layout = program.shardings, program.layout
    if layout.devices > 1:
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        whole = PartitionSpec()
        local = jax.shard_map(
            local,
            mesh=layout.mesh,
            in_specs=(specs, layout.spec(POOL_AXES), whole, _Data(*(whole,) * 6)),
            out_specs=specs,
            check_vma=False,
        )
    return jax.jit(local, donate_argnums=0, out_shardings=shardings)


def _join_local(active: Active, pool: Array, pages: Array, data: _Data, *, program: _Program) -> Active:
    """One device's part: its stream is put together from its part of the pages."""
    shape = program.shape
    stream = pool[pages, 0].reshape(-1)
    most, most_products = jnp.max(data.ranks), jnp.max(data.products)
    arrays: dict[str, dict[Any, Array]] = {name: dict(getattr(active, name)) for name in "abuv"}
    readers = {target: group for group in active.a for target in group}
    at = jnp.int32(0)
    for number, target in enumerate(program.targets):
        for name in "abuv":
            key = readers.get(target) if name == "a" else target
            if key not in arrays[name]:
                continue
            stack = _Stack(arrays[name][key], readers[target].index(target) if name == "a" else None)
            if name in "ab":
                entries = _Entries(data.ranks[number], data.rank, most, shape.ranks, identity=False)
            else:
                entries = _Entries(data.products[number], data.vector, most_products, shape.vectors, identity=True)
            if entries.width:
                arrays[name][key] = _written(stack, stream, at, entries)
            at += stack.array.shape[0] * entries.own * math.prod(stack.features)
    return Active(
        **arrays,
        owner=jnp.where(_within(active.ranks, data.rank, most), data.number, active.owner),
        scales_bias=jnp.where(
            _within(active.vectors, data.vector, most_products), data.scales_bias, active.scales_bias
        ),
    )


def _within(total: int, start: Array, count: Array) -> Array:
    numbers = jnp.arange(total, dtype=jnp.int32)
    return (numbers >= start) & (numbers < start + count)


class _Entries(NamedTuple):
    """Ranks or vectors of one target to write: `own` from the stream, then zeros up to `most`, from `start` on.

    width (static): of the window that is written. identity (static): they are vectors of base products, of which a
    target that has none (while others have) needs one of ones.
    """

    own: Array
    start: Array
    most: Array
    width: int
    identity: bool


class _Stack(NamedTuple):
    """One target's entries in an array of the active set: [L, R, *features], or [L, *features, M, R] of one reader."""

    array: Array
    reader: int | None

    @property
    def features(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.array.shape
        return shape[2:] if self.reader is None else shape[1:-2]

    @property
    def total(self) -> int:
        return int(self.array.shape[1 if self.reader is None else -1])

    def window(self, first: Array, width: int) -> Float[Array, "L w *features"]:
        """So many entries, from `first` on."""
        if self.reader is None:
            return jax.lax.dynamic_slice_in_dim(self.array, first, width, axis=1)
        own = jax.lax.slice_in_dim(self.array, self.reader, self.reader + 1, axis=-2)[..., 0, :]
        return jnp.moveaxis(jax.lax.dynamic_slice_in_dim(own, first, width, axis=-1), -1, 1)

    def updated(self, new: Float[Array, "L w *features"], first: Array) -> Array:
        """The array with these entries from `first` on."""
        if self.reader is None:
            return jax.lax.dynamic_update_slice_in_dim(self.array, new, first, axis=1)
        start: list[Any] = [*[0] * (self.array.ndim - 2), self.reader, first]
        return jax.lax.dynamic_update_slice(self.array, jnp.moveaxis(new, 1, -1)[..., None, :], start)


def _written(stack: _Stack, stream: Float[Array, " elements"], at: Int[Array, ""], entries: _Entries) -> Array:
    """The stack's array with the entries that begin at `at` of the stream."""
    own, start, most, width, identity = entries
    layers, features, dtype = stack.array.shape[0], stack.features, stack.array.dtype
    size = math.prod(features)
    first = jnp.clip(start, 0, stack.total - width)  # of the window, which may begin before `start`
    entry = jnp.arange(width, dtype=jnp.int32) - (start - first)
    taken = jnp.clip(entry, 0, jnp.maximum(own - 1, 0))
    begins = at + (jnp.arange(layers, dtype=jnp.int32)[:, None] * own + taken) * size
    read = jax.vmap(jax.vmap(lambda begin: jax.lax.dynamic_slice(stream, (begin,), (size,))))(begins)
    read = read.reshape(layers, width, *features).astype(dtype)

    def wide(chosen: Array) -> Array:
        return chosen.reshape(1, -1, *(1,) * len(features))

    padding = jnp.where(wide((entry == 0) & (own == 0) & identity), 1, 0).astype(dtype)
    new = jnp.where(wide(entry < own), read, padding)
    new = jnp.where(wide((entry >= 0) & (entry < most)), new, stack.window(first, width))
    return stack.updated(new, first)
