"""How the decoder reads the active set: one target's adapted projection.

    y = sum_j v_j * ((u_j * x) W) + ((x A) * M) B + bias      M[row, rank] = (owner[rank] == the row's adapter)

One dense product reads the factors of all adapters, whatever their ranks; the mask keeps each row to its own. Rows
whose adapter scales the base's products take vectors u and v of their own (entry 0 is ones: the base); a row with
j products stands j times in the product's input, so W is read once.

A is shared by the targets that read the same activations (q, k, v; gate, up), which meet it in one product.

Shape legend: L layers, M readers, b rows, s tokens, R ranks, S vectors (1 + base products), E extra rows, N = b + E.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jora.kernels.on_shards import on_shards
from jora.kernels.widen import product
from jora.models.adapted import Dense, Rows, Site
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

    mask: Bool[Array, "b 1 1 R"]
    expanded: Expanded | None
    scales_bias: Bool[Array, " S"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActiveProjection:
    """One target's part; leaves gain a leading layer axis outside the scan. None: this form is not there.

    readers: the targets that read what this one reads, and share its product with A; itself among them. The first of
    them holds A: like the weights it is cut by the scan (a GPU reads such slices in place, any other from a copy).
    """

    a: Float[Array, "*in M R"] | None
    b: Float[Array, "R *out"] | None
    u: Float[Array, "S *in"] | None
    v: Float[Array, "S *out"] | None
    readers: tuple[str, ...] = field(metadata={"static": True})

    def apply(self, x: Array, dense: Dense, site: Site, rows: Rows) -> Array:
        y = dense(x) if self.u is None else self._products(x, dense, site.shared)
        return y if self.b is None else y + self._low_rank(x, dense.layout, site)

    def _low_rank(self, x: Float[Array, "b s *in"], layout: Layout, site: Site) -> Float[Array, "b s *out"]:
        """((x A) * M) B in x's dtype with fp32 sums; devices exchange [tokens, rank] alone."""
        assert self.b is not None
        shared: Shared = site.shared
        # Every reader writes this product and its mask down, over the same arrays: the compiler keeps one of them.
        a = site.beside[self.readers[0]].a
        contract = (tuple(range(2, x.ndim)), tuple(range(x.ndim - 2)))
        inner = layout.constrain(product(x, a.astype(x.dtype), contract).astype(x.dtype), None, None, None, None)
        own = jnp.where(shared.mask, inner, 0)[:, :, self.readers.index(site.target)]
        return product(own, self.b.astype(x.dtype), ((2,), (0,)), x.dtype)

    def _products(self, x: Float[Array, "b s *in"], dense: Dense, shared: Shared) -> Float[Array, "b s *out"]:
        """sum_j v_j * ((u_j * x) W), each weight read once, and the bias."""
        assert self.u is not None and self.v is not None and shared.expanded is not None
        vector, row = shared.expanded
        u, v = self.u[vector].astype(jnp.float32), self.v[vector].astype(jnp.float32)
        cut = tuple(None if axis == "embed" else axis for axis in dense.in_axes + dense.out_axes)
        into, out, layout = cut[: dense.inputs], cut[dense.inputs :], dense.layout

        def scaled(x: Array, weight: Array, u: Array, v: Array) -> Array:
            over = mesh_axes(layout.spec(cut, weight.shape)[: dense.inputs]) if layout.devices > 1 else ()
            axes = ((None, None, *into), cut, (None, *into), (None, *out), (None,))
            shape = (*x.shape[:2], *weight.shape[dense.inputs :])
            return on_shards(
                partial(_sum, over=over), layout, (x, weight, u, v, jnp.asarray(row)), axes, (None, None, *out), shape
            )

        y = dense.with_weight(scaled, x, u, v)
        if dense.bias is None:
            return y
        factor = jnp.where(
            shared.scales_bias[vector[: x.shape[0]]].reshape(-1, *(1,) * (v.ndim - 1)), v[: x.shape[0]], 1
        )
        return y + (dense.bias * factor[:, None]).astype(y.dtype)


def _sum(x: Array, weight: Array, u: Array, v: Array, row: Array, over: tuple[str, ...]) -> Array:
    """One device's part, summed over j before devices exchange anything; `over`: mesh axes that cut the input."""
    rows, own = x.shape[0], x.ndim - 2
    wide = jnp.concatenate([x, x.at[row].get(mode="clip")]) if row.size else x
    scaled = (wide.astype(jnp.float32) * u[:, None]).astype(x.dtype)
    terms = product(scaled, weight, (tuple(range(2, 2 + own)), tuple(range(own))), x.dtype)
    # The CPU compiler of jax 0.10 fuses a product with what sums parts of it, and may return what it never wrote.
    terms = jax.lax.optimization_barrier(terms)
    terms = terms.astype(jnp.float32) * v[:, None]
    y = terms[:rows]
    if row.size:
        y = y.at[row].add(terms[rows:], mode="drop")
    y = y.astype(x.dtype)
    return jax.lax.psum(y, over) if over else y
