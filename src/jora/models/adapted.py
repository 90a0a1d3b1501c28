"""The one place where a frozen weight meets an adapter, and the protocol that methods fill in.

The decoder calls `project` for every linear layer; it knows no method by name. A method (one file under
`jora/methods/`) binds its state to a `Bound`, whose projections are scanned over the layers beside the
weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jora.sharding import Layout


class Rows(NamedTuple):
    """What a method may depend on besides the activations."""

    dropout: UInt32[Array, " b"] | None = None  # a seed per row of the batch; None: no dropout (evaluation)
    tokens: Int[Array, "b s"] | None = None  # which tokens of the row these are; None: all, in order


class Site(NamedTuple):
    """Where a projection stands: the target's name (static) and the layer's number (traced)."""

    target: str
    layer: Int[Array, ""]

    def salt(self, seeds: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        """Row seeds made this site's own."""
        from jora.kernels.counter_hash import fold_all

        return fold_all(seeds, self.layer, np.uint32(zlib.crc32(self.target.encode())))


@dataclass(frozen=True)
class Dense:
    """The frozen weight of one site: `dense(x)` is the base model's projection.

    x: [b, s, *in]; weight: [*in, *out], with its logical axes in `in_axes` and `out_axes`.
    """

    weight: Float[Array, "..."]
    bias: Float[Array, "..."] | None
    in_axes: tuple[str | None, ...]
    out_axes: tuple[str | None, ...]
    layout: Layout

    @property
    def inputs(self) -> int:
        """Number of input dimensions."""
        return len(self.in_axes)

    def __call__(self, x: Float[Array, "b s ..."]) -> Float[Array, "b s ..."]:
        y = self._product(x)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Array) -> Array:
        axes = self.in_axes + self.out_axes
        if not self.layout.is_cut(axes, self.weight.shape, "embed"):
            return jnp.tensordot(x, self.weight, axes=self.inputs)
        # FSDP: collect this one weight, used once and dropped. The shards arrive stacked on a new leading axis,
        # [f, ...]: any other order would make the compiler transpose all layers' weights before the loop.
        shards = self.layout.gather_shards(self.weight, axes)
        weight = jnp.moveaxis(shards, 0, axes.index("embed")).reshape(self.weight.shape)
        return jnp.tensordot(x, weight, axes=self.inputs)


@runtime_checkable
class Projection(Protocol):
    """A pytree of adapter factors for one target; leaves carry a leading layer axis outside the scan."""

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        """The adapted projection of x: [b, s, *in] -> [b, s, *out]."""
        ...


@runtime_checkable
class EmbedProjection(Protocol):
    """An adapter of the embedding table."""

    def embed(self, tokens: Int[Array, "b s"], vectors: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """The adapted embedding, before the family's scale; `vectors` are the base's."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bound:
    """An adapter as the decoder receives it. Leaves of `layers` are [layers, ...]."""

    layers: Mapping[str, Any] = field(default_factory=dict)  # target -> Projection
    embed: Any = None  # EmbedProjection | None
    head: Any = None  # Projection | None


BASE = Bound()


def project(x: Array, dense: Dense, projection: Projection | None, site: Site, rows: Rows) -> Array:
    """One linear layer, adapted or not."""
    return dense(x) if projection is None else projection.apply(x, dense, site, rows)
