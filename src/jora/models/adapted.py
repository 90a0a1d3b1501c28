"""The one place where a frozen weight meets an adapter, and the protocol that methods fill in.

The decoder calls `project` for every linear layer; it knows no method by name. A method (one file under
`jora/methods/`) binds its state to a `Bound`, whose projections are scanned over the layers beside the
weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from jora.kernels.gpu_compiler import kept
from jora.kernels.widen import product
from jora.quant import Pieces, QuantisedWeight
from jora.sharding import Layout
from jora.sharding.layout import mesh_axes


class Rows(NamedTuple):
    """What a method may depend on besides the activations."""

    dropout: UInt32[Array, " b"] | None = None  # a seed per row of the batch; None: no dropout (evaluation)
    tokens: Int[Array, "b s"] | None = None  # which tokens of the row these are; None: all, in order
    instance: Float[Array, "b h"] | None = None  # a vector of each row's prompt, for methods that ask for one
    jobs: Int[Array, " b"] | None = None  # the job (adapter) that each row belongs to; None: one for all rows


class Site(NamedTuple):
    """Where a projection stands: the target's name (static) and the layer's number (traced)."""

    target: str
    layer: Int[Array, ""]
    shared: Any = None  # `Bound.shared`
    beside: Mapping[str, Any] = {}  # the projections of this layer's targets

    def salt(self, seeds: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        """Row seeds made this site's own."""
        from jora.kernels.counter_hash import fold_all

        return fold_all(seeds, self.layer, np.uint32(zlib.crc32(self.target.encode())))


@dataclass(frozen=True)
class Dense:
    """The frozen weight of one site: `dense(x)` is the base model's projection.

    x: [b, s, *in]; weight: [*in, *out], with its logical axes in `in_axes` and `out_axes`; maybe quantised.
    """

    weight: Any  # Float[Array, "..."] | QuantisedWeight
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

    def column_norm(self, a: Float[Array, "*in r"], b: Float[Array, "r *out"]) -> Float[Array, "*out"]:
        """|W + A B| of every output feature: the root of the sum of squares over the inputs; fp32.

        |W + A B|^2 = |W|^2 + 2 <W, A B> + |A B|^2, and <W, A B> = <A^T W, B>: neither the sum nor A B is made,
        the weight stays where it is, and devices exchange [*out] numbers alone.
        """
        layout, axes = self.layout, self.in_axes + self.out_axes
        weight = self.weight_of()
        spec = layout.spec(axes, weight.shape)
        cut, kept = spec[: self.inputs], spec[self.inputs :]
        over = mesh_axes(cut)
        local = partial(_squares, inputs=self.inputs)
        if layout.devices == 1:
            squares = local(weight, a, b)
        else:
            squares = jax.shard_map(
                lambda *parts: jax.lax.psum(local(*parts), over),
                mesh=layout.mesh,
                in_specs=(spec, PartitionSpec(*cut, None), PartitionSpec(None, *kept)),
                out_specs=PartitionSpec(*kept),
                check_vma=False,
            )(weight, a, b)
        # A number a feature, for which the backward pass would read the weight again: kept (`decoder.SAVED`).
        return checkpoint_name(jnp.sqrt(jnp.maximum(squares, 0.0)), "column_norm")

    def weight_of(self, dtype: Any = None) -> Float[Array, "..."]:
        """The dense weight [*in, *out] of this layer, cut as the base's are: nothing is collected over fsdp.

        dtype: None is the weight's own, fp32 of a quantised one.
        """
        if isinstance(self.weight, QuantisedWeight):
            return self.weight.dequantise(self._pieces, dtype or jnp.float32, collect=False)
        return self.weight if dtype is None else self.weight.astype(dtype)

    @property
    def _pieces(self) -> Pieces:
        return Pieces.of(self.layout, self.weight.shape, self.in_axes + self.out_axes, len(self.out_axes))

    def _product(self, x: Array) -> Array:
        return self.with_weight(partial(jnp.tensordot, axes=self.inputs), x)

    def with_weight(self, product: Callable[..., Array], x: Array, *others: Array) -> Array:
        """product(x, weight, *others), where weight [*in, *out] is dense, its fsdp shards collected.

        A quantised weight is collected packed, and made dense once more for the backward pass: kept for it, the
        dense weights of all layers would exist at once.
        """
        if not isinstance(self.weight, QuantisedWeight):
            return product(x, self._collected(self.weight), *others)

        @partial(jax.checkpoint, prevent_cse=False)
        def dequantised(x: Array, weight: QuantisedWeight, *others: Array) -> Array:
            return product(x, weight.dequantise(self._pieces, x.dtype, collect=True), *others)

        return dequantised(x, self.weight, *others)

    def _collected(self, weight: Array) -> Array:
        axes = self.in_axes + self.out_axes
        if not self.layout.is_cut(axes, weight.shape, "embed"):
            return weight
        # FSDP: collect this one weight, used once and dropped. The shards arrive stacked on a new leading axis,
        # [f, ...]: any other order would make the compiler transpose all layers' weights before the loop.
        shards = self.layout.gather_shards(weight, axes)
        return jnp.moveaxis(shards, 0, axes.index("embed")).reshape(weight.shape)


def _squares(w: Array, a: Array, b: Array, *, inputs: int) -> Float[Array, "*out"]:
    """Sums of squares of W + A B over these inputs, fp32: w [*in, *out], a [*in, r], b [r, *out]."""
    out, rank = w.shape[inputs:], a.shape[-1]
    # As matrices: for a sum over the rows of [in, heads, width] XLA:GPU transposes the stacks of all layers first.
    a, b = a.reshape(-1, rank), b.reshape(rank, -1)
    w = w.reshape(a.shape[0], b.shape[1])
    mixed = product(a.astype(w.dtype), w, ((0,), (0,)))  # A^T W
    squares = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)
    return (squares + jnp.sum(b * (2 * mixed + (a.T @ a) @ b), axis=0)).reshape(out)


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
    prefix: Float[Array, "b m d"] | None = None  # in place of the first m tokens' embeddings; b may be 1
    prefix_slots: Int[Array, ""] | None = None  # of which only so many are there; None: all
    shared: Any = None  # arrays that all layers use, kept out of the scan: projections find them in their Site


BASE = Bound()


def project(x: Array, dense: Dense, projection: Projection | None, site: Site, rows: Rows) -> Array:
    """One linear layer, adapted or not."""
    return kept(dense(x) if projection is None else projection.apply(x, dense, site, rows))
