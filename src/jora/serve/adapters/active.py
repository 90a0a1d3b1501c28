"""The active set on the device: the factors of the adapters that run, side by side, and how the decoder reads them.

    y = sum_j v_j * ((u_j * x) W) + ((x A^T) * M) B + bias      M[row, rank] = (owner[rank] == the row's adapter)

One dense product reads the factors of all adapters, whatever their ranks; the mask keeps each row to its own. Rows
whose adapter scales the base's products take vectors u and v of their own (entry 0 is ones: the base); a row with
j products stands j times in the product's input, so W is read once.

`Active` is written when an adapter joins (see `joining`), not in every step.

Shape legend: L layers, b rows, s tokens, R ranks, S vectors (1 + base products), E extra rows, N = b + E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int

from jora.kernels.on_shards import on_shards
from jora.kernels.widen import widen
from jora.models.adapted import Bound, Dense, Rows, Site
from jora.models.config import ModelConfig
from jora.serve.adapters.packing import Part, TargetSpec, target_parts
from jora.sharding import Layout
from jora.sharding.layout import mesh_axes


class Expanded(NamedTuple):
    """Which vectors scale which products: of the b rows themselves, then of the extra ones.

    vector: entry of u and v. row: the row that an extra product belongs to; b where it is only padding.
    """

    vector: Int[Array, " N"] | Int[np.ndarray, " N"]
    row: Int[Array, " E"] | Int[np.ndarray, " E"]


class Shared(NamedTuple):
    """What the projections of all layers share in one step."""

    mask: Bool[Array, "b 1 R"]
    expanded: Expanded | None
    scales_bias: Bool[Array, " S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActiveProjection:
    """One target's part; leaves gain a leading layer axis outside the scan. None: this form is not there."""

    a: Float[Array, "R *in"] | None
    b: Float[Array, "R *out"] | None
    u: Float[Array, "S *in"] | None
    v: Float[Array, "S *out"] | None

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        shared: Shared = site.shared
        y = dense(x) if self.u is None else self._products(x, dense, shared)
        return y if self.a is None else y + self._low_rank(x, dense.layout, shared.mask)

    def _low_rank(self, x: Float[Array, "b s *in"], layout: Layout, mask: Array) -> Float[Array, "b s *out"]:
        """((x A^T) * M) B in x's dtype with fp32 sums; devices exchange [tokens, rank] alone."""
        assert self.a is not None and self.b is not None
        a = self.a
        if layout.devices == 1:  # a sum over several axes (o_proj's heads) would transpose A in every step
            x, a = x.reshape(*x.shape[:2], -1), a.reshape(a.shape[0], -1)
        contract = (tuple(range(2, x.ndim)), tuple(range(1, a.ndim)))
        inner = layout.constrain(_product(x, a, contract).astype(x.dtype), None, None, None)
        return _product(jnp.where(mask, inner, 0), self.b, ((2,), (0,))).astype(x.dtype)

    def _products(self, x: Float[Array, "b s *in"], dense: Dense, shared: Shared) -> Float[Array, "b s *out"]:
        """sum_j v_j * ((u_j * x) W), each weight read once, and the bias."""
        assert self.u is not None and self.v is not None and shared.expanded is not None
        vector, row = shared.expanded
        u, v = self.u[vector].astype(jnp.float32), self.v[vector].astype(jnp.float32)
        cut = tuple(None if axis == "embed" else axis for axis in dense.in_axes + dense.out_axes)
        into, out, layout = cut[: dense.inputs], cut[dense.inputs :], dense.layout

        def product(x: Array, weight: Array, u: Array, v: Array) -> Array:
            over = mesh_axes(layout.spec(cut, weight.shape)[: dense.inputs]) if layout.devices > 1 else ()
            axes = ((None, None, *into), cut, (None, *into), (None, *out), (None,))
            shape = (*x.shape[:2], *weight.shape[dense.inputs :])
            return on_shards(
                partial(_sum, over=over), layout, (x, weight, u, v, jnp.asarray(row)), axes, (None, None, *out), shape
            )

        y = dense.with_weight(product, x, u, v)
        if dense.bias is None:
            return y
        scaled = jnp.where(
            shared.scales_bias[vector[: x.shape[0]]].reshape(-1, *(1,) * (v.ndim - 1)), v[: x.shape[0]], 1
        )
        return y + (dense.bias * scaled[:, None]).astype(y.dtype)


def _sum(x: Array, weight: Array, u: Array, v: Array, row: Array, over: tuple[str, ...]) -> Array:
    """One device's part, summed over j before devices exchange anything; `over`: mesh axes that cut the input."""
    rows, own = x.shape[0], x.ndim - 2
    wide = jnp.concatenate([x, x.at[row].get(mode="clip")]) if row.size else x
    scaled = (wide.astype(jnp.float32) * u[:, None]).astype(x.dtype)
    terms = _product(scaled, weight, (tuple(range(2, 2 + own)), tuple(range(own)))).astype(x.dtype)
    # The CPU compiler of jax 0.10 fuses a product with what sums parts of it, and may return what it never wrote.
    terms = jax.lax.optimization_barrier(terms)
    terms = terms.astype(jnp.float32) * v[:, None]
    y = terms[:rows]
    if row.size:
        y = y.at[row].add(terms[rows:], mode="drop")
    y = y.astype(x.dtype)
    return jax.lax.psum(y, over) if over else y


def _product(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """Sum over the paired dimensions, in fp32."""
    x, y = widen(x, y.astype(x.dtype))
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Active:
    """The factors of all running adapters, by target, in the base's dtype.

    owner: number of the adapter that a rank belongs to, -1 where it is free; what free ranks hold is finite.
    scales_bias: whether the products of a vector take the bias with them. Entry 0 of u and v is ones.
    """

    a: Mapping[str, Float[Array, "L R *in"]]
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
        mask = ((self.owner >= 0) & (self.owner == numbers[:, None]))[:, None]
        u, v = (self.u, self.v) if expanded is not None else ({}, {})
        targets = dict.fromkeys([*self.a, *u])
        layers = {t: ActiveProjection(self.a.get(t), self.b.get(t), u.get(t), v.get(t)) for t in targets}
        return Bound(layers, shared=Shared(mask, expanded, self.scales_bias))


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
        widths = [(0, size - own if dimension == axis else 0) for dimension in range(x.ndim)]
        return jnp.pad(taken, widths, constant_values=filler)

    def factors(stacks: Mapping[str, Array], start: Array | int, size: int) -> dict[str, Array]:
        return {target: window_of(x, start, size, 1) for target, x in stacks.items()} if size else {}

    return Active(
        factors(active.a, rank, shape.ranks),
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


@lru_cache(maxsize=64)
def active_shardings(config: ModelConfig, layout: Layout, targets: tuple[str, ...], ranks: int, vectors: int) -> Any:
    """How an active set lies on the devices. Every program that makes one is held to these: another form of the same
    sharding would compile all programs that read the set once more.
    """
    found: dict[str, dict[str, NamedSharding]] = {name: {} for name in "abuv"}
    for part in active_parts(config, targets, ranks, vectors):
        found[part.name][part.target] = part.sharding(layout)
    whole = layout.sharding((None,))
    return Active(**found, owner=whole, scales_bias=whole)  # type: ignore[arg-type]


def active_parts(config: ModelConfig, targets: tuple[str, ...], ranks: int, vectors: int) -> Iterator[Part]:
    """The arrays of an active set."""
    for target in targets:
        yield from target_parts(config, TargetSpec(target, ranks, vectors))


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
        arrays: dict[str, dict[str, Array]] = {name: {} for name in "abuv"}
        for part in active_parts(config, targets, ranks, vectors):
            zeros = jnp.zeros(part.shape, dtype)
            arrays[part.name][part.target] = zeros if part.name in "ab" else zeros.at[:, 0].set(1)
        return Active(**arrays, owner=jnp.full(ranks, -1, jnp.int32), scales_bias=jnp.zeros(vectors, bool))

    return jax.jit(empty, out_shardings=active_shardings(config, layout, targets, ranks, vectors))
