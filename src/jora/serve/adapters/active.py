"""The active set on the device: the factors of the adapters that run, side by side (`projection` reads them).

`Active` is written when an adapter joins (see `joining`), not in every step.

Shape legend: L layers, M readers of the same activations, b rows, R ranks, S vectors (1 + base products).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jora.methods.lora import site_shape
from jora.models.adapted import Bound
from jora.models.config import ModelConfig
from jora.serve.adapters.packing import TargetSpec, target_parts
from jora.serve.adapters.projection import ActiveProjection, Expanded, Shared
from jora.sharding import Layout

# Linears that read the same activations.
READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def readers_of(targets: Sequence[str]) -> list[tuple[str, ...]]:
    """Those of `targets` that read the same activations, group by group."""
    served = (tuple(target for target in group if target in targets) for group in READERS)
    return [group for group in served if group]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Active:
    """The factors of all running adapters in the base's dtype, by target; A by the targets that read the same.

    owner: number of the adapter that a rank belongs to, -1 where it is free; what free ranks hold is finite.
    scales_bias: whether the products of a vector take the bias with them. Entry 0 of u and v is ones.
    """

    a: Mapping[tuple[str, ...], Float[Array, "L *in M R"]]
    b: Mapping[str, Float[Array, "L R *out"]]
    u: Mapping[str, Float[Array, "L S *in"]]
    v: Mapping[str, Float[Array, "L S *out"]]
    owner: Int[Array, " R"]
    scales_bias: Bool[Array, " S"]

    @property
    def ranks(self) -> int:
        return self.owner.shape[0]

    @property
    def vectors(self) -> int:
        """S; 0 where no adapter may scale the base's products."""
        return self.scales_bias.shape[0]

    def bind_decode(self, numbers: Int[Array, " b"], expanded: Expanded | None = None) -> Bound:
        """The adapters of a batch, inside jit: of the decode batch, or (with a `part` of the set) of one sequence.

        numbers: of each row's adapter, -1 for the base. expanded: None (static) where no row has base products of its
        own.
        """
        mask = ((self.owner >= 0) & (self.owner == numbers[:, None]))[:, None, None]
        u, v = (self.u, self.v) if expanded is not None else ({}, {})
        readers = {target: group for group in self.a for target in group}
        held = {group[0]: a for group, a in self.a.items()}
        layers = {
            target: ActiveProjection(
                held.get(target), self.b.get(target), u.get(target), v.get(target), readers.get(target, ())
            )
            for target in dict.fromkeys([*self.b, *u])
        }
        return Bound(layers, shared=Shared(mask, expanded, self.scales_bias))


K = TypeVar("K")


class PartShape(NamedTuple):
    """How many ranks and vectors are taken out of an active set."""

    ranks: int
    vectors: int


@partial(jax.jit, static_argnames="shape")
def part(active: Active, rank: Int[Array, ""] | int, vector: Int[Array, ""] | int, *, shape: PartShape) -> Active:
    """Windows of an active set, from these on: what prefill needs of it.

    A window at the end of the set begins earlier; of a set that is smaller, all of it is taken and filled up.
    """

    def window_of(x: Array, start: Array | int, size: int, axis: int, filler: int = 0) -> Array:
        own = min(size, x.shape[axis])
        taken = jax.lax.dynamic_slice_in_dim(x, start, own, axis)
        widths = [(0, size - own if dimension == axis % x.ndim else 0) for dimension in range(x.ndim)]
        return jnp.pad(taken, widths, constant_values=filler)

    def factors(stacks: Mapping[K, Array], start: Array | int, size: int, axis: int = 1) -> dict[K, Array]:
        return {key: window_of(x, start, size, axis) for key, x in stacks.items()} if size else {}

    return Active(
        factors(active.a, rank, shape.ranks, axis=-1),
        factors(active.b, rank, shape.ranks),
        factors(active.u, vector, shape.vectors),
        factors(active.v, vector, shape.vectors),
        window_of(active.owner, rank, shape.ranks, 0, filler=-1),
        window_of(active.scales_bias, vector, shape.vectors, 0),
    )


def windows(total: int) -> tuple[int, ...]:
    """Widths in which one adapter's ranks are read or written: 8, 32, 128, ... up to `total`; () for 0.

    A program for each, so they grow by four.
    """
    widths = [8 * 4**step for step in range(8)]
    return (*(width for width in widths if width < total), total) if total else ()


def window(total: int, rank: int) -> int:
    """The narrowest window that holds an adapter of this rank."""
    return next((width for width in windows(total) if width >= rank), total)


class ActivePart(NamedTuple):
    """One array of an active set. key: a target, of A the targets that read the same; axes: logical."""

    name: str  # "a", "b", "u" or "v"
    key: Any
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def active_parts(config: ModelConfig, targets: tuple[str, ...], ranks: int, vectors: int) -> Iterator[ActivePart]:
    """The arrays of an active set."""
    for group in readers_of(targets) if ranks else ():
        site = site_shape(config, group[0])
        shape = (config.layers, *site.in_shape, len(group), ranks)
        yield ActivePart("a", group, shape, (None, *site.in_axes, None, None))
    for target in targets:
        for part in target_parts(config, TargetSpec(target, ranks, vectors)):
            if part.name != "a":
                yield ActivePart(part.name, target, part.shape, part.axes)


@lru_cache(maxsize=64)
def active_shardings(config: ModelConfig, layout: Layout, targets: tuple[str, ...], ranks: int, vectors: int) -> Any:
    """How an active set lies on the devices. Every program that makes one is held to these: another form of the same
    sharding would compile all programs that read the set once more.
    """
    found: dict[str, dict[Any, NamedSharding]] = {name: {} for name in "abuv"}
    for part in active_parts(config, targets, ranks, vectors):
        found[part.name][part.key] = layout.sharding(part.axes, part.shape)
    whole = layout.sharding((None,))
    return Active(**found, owner=whole, scales_bias=whole)  # type: ignore[arg-type]


def new_active(
    config: ModelConfig, layout: Layout, targets: tuple[str, ...], ranks: int, products: int, dtype: Any
) -> Active:
    """An empty active set for so many ranks and base products in all, cut as training's factors are."""
    made: Active = _empty(config, layout, targets, ranks, 1 + products if products else 0, jnp.dtype(dtype))()
    return made


@lru_cache(maxsize=64)
def _empty(
    config: ModelConfig, layout: Layout, targets: tuple[str, ...], ranks: int, vectors: int, dtype: np.dtype[Any]
) -> Callable[[], Active]:
    """A program kept, so that a set may be made anew without compiling."""

    def empty() -> Active:
        arrays: dict[str, dict[Any, Array]] = {name: {} for name in "abuv"}
        for part in active_parts(config, targets, ranks, vectors):
            zeros = jnp.zeros(part.shape, dtype)
            arrays[part.name][part.key] = zeros if part.name in "ab" else zeros.at[:, 0].set(1)
        return Active(**arrays, owner=jnp.full(ranks, -1, jnp.int32), scales_bias=jnp.zeros(vectors, bool))

    return jax.jit(empty, out_shardings=active_shardings(config, layout, targets, ranks, vectors))
