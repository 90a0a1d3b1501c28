"""The contiguous key-value cache of generation: slot t of a row holds token t of that row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.models.config import ModelConfig
from jora.sharding import Layout

KV_AXES = (None, "batch", None, "kv_heads", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of all L layers."""

    k: Float[Array, "L b t kv h"]
    v: Float[Array, "L b t kv h"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """`lengths`: tokens that each row holds. `kv` travels in the scan's carry, so it is updated in place."""

    kv: KV
    lengths: Int[Array, " b"]

    def indices(self, count: int) -> Int[Array, "b s"]:
        """Slots that the next `count` tokens of each row take."""
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)

    def advance(self, counts: Int[Array, " b"]) -> Cache:
        """The cache after `counts` new tokens a row; slots beyond a row's length are overwritten later."""
        return replace(self, lengths=self.lengths + counts)


def new_cache(config: ModelConfig, layout: Layout, rows: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` tokens a row."""

    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    sharding = layout.sharding(KV_AXES, shape)
    kv = KV(jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding))
    return Cache(kv, jnp.zeros(rows, jnp.int32))


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
