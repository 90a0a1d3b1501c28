"""Caches of keys and values: what the decoder asks of one, and the contiguous one of generation.

`jora.models.paged` has the other, whose tokens lie in the pages of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels.attention import cached_attention
from jora.kernels.spec import AttentionSpec
from jora.models.config import ModelConfig
from jora.sharding import Layout

KV_AXES = (None, "batch", None, "kv_heads", None)


class CachedLayer(NamedTuple):
    """The attention of one layer inside the scan.

    window: the last keys that a query sees; spec has what all layers share. among: attention of whole sequences'
    new q, k and v among themselves.
    """

    number: Int[Array, ""]
    window: Int[Array, ""]
    spec: AttentionSpec
    among: Callable[[Array, Array, Array], Array]


class KVCache(Protocol):
    """A pytree that travels in the scan's carry, so that it is updated in place."""

    def positions(self, count: int) -> Int[Array, "b s"]:
        """Positions of the next `count` tokens of each row."""
        ...

    def attend(
        self, q: Float[Array, "b s k g h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], layer: CachedLayer
    ) -> tuple[Float[Array, "b s k g h"], Self]:
        """Store the new tokens' keys and values, then let each query see what its row holds."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of all L layers."""

    k: Float[Array, "L b t kv h"]
    v: Float[Array, "L b t kv h"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Slot t of a row holds token t of that row. `lengths`: tokens that each row holds.

    empty: no row holds any, so new tokens attend to one another by the blocked kernel instead of to all slots.
    """

    kv: KV
    lengths: Int[Array, " b"]
    empty: bool = field(default=False, metadata={"static": True})

    def positions(self, count: int) -> Int[Array, "b s"]:
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)

    def attend(self, q: Array, k: Array, v: Array, layer: CachedLayer) -> tuple[Array, Cache]:
        at = None if self.empty else self.positions(q.shape[1])
        kv = write(self.kv, layer.number, at, k, v)
        if at is None:
            out = layer.among(q, k, v)
        else:
            out = cached_attention(q, kv.k[layer.number], kv.v[layer.number], at, layer.window, layer.spec)
        return out, replace(self, kv=kv)

    def advance(self, counts: Int[Array, " b"]) -> Cache:
        """The cache after `counts` new tokens a row; slots beyond a row's length are overwritten later."""
        return Cache(self.kv, self.lengths + counts)


def new_cache(config: ModelConfig, layout: Layout, rows: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` tokens a row."""

    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    sharding = layout.sharding(KV_AXES, shape)
    kv = KV(jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding))
    return Cache(kv, jnp.zeros(rows, jnp.int32), empty=True)


def write(kv: KV, layer: Int[Array, ""], indices: Int[Array, "b s"] | None, k: Array, v: Array) -> KV:
    """Store new keys and values [b, s, kv, h] of one layer at their slots; slots past the end are dropped.

    indices None: the cache is empty, the tokens take the first s slots.
    """
    if indices is None:
        start = (layer, 0, 0, 0, 0)
        return KV(
            jax.lax.dynamic_update_slice(kv.k, k[None], start),
            jax.lax.dynamic_update_slice(kv.v, v[None], start),
        )

    def store(stack: Array, at: Int[Array, " s"], new: Array) -> Array:
        return stack.at[layer, at].set(new, mode="drop")

    # Mapped over the rows, which the compiler then knows to be independent: none is gathered on a mesh.
    over_rows = jax.vmap(store, in_axes=(1, 0, 0), out_axes=1)
    return KV(over_rows(kv.k, indices, k), over_rows(kv.v, indices, v))
