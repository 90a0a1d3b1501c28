"""Caches of keys and values: what the decoder asks of one, and the contiguous one of generation.

`jora.models.paged` has the other, whose tokens lie in the pages of a pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels.cached_attention import cached_attention, write_slots
from jora.kernels.spec import AttentionSpec
from jora.models.config import ModelConfig
from jora.sharding import Layout

# Logical axes around attention: heads are independent, so all of it is local to a device.
Q_AXES = ("batch", None, "kv_heads", "q_group", None)
KV_AXES = ("batch", None, "kv_heads", None)
STACK_AXES = (None, *KV_AXES)


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
    layout: Layout = field(metadata={"static": True})
    empty: bool = field(default=False, metadata={"static": True})

    def positions(self, count: int) -> Int[Array, "b s"]:
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)

    def attend(self, q: Array, k: Array, v: Array, layer: CachedLayer) -> tuple[Array, Cache]:
        if self.empty:
            kv = KV(_fill(self.kv.k, layer.number, k), _fill(self.kv.v, layer.number, v))
            return layer.among(q, k, v), replace(self, kv=kv)
        at = self.positions(q.shape[1])
        arrays = (self.kv.k, self.kv.v, q, k, v, at, layer.number, layer.window)
        axes = (STACK_AXES, STACK_AXES, Q_AXES, KV_AXES, KV_AXES, ("batch", None), (), ())
        local = partial(_attend, spec=layer.spec)
        out, *stacks = self.layout.local(local, arrays, axes, [Q_AXES, STACK_AXES, STACK_AXES])
        return out, replace(self, kv=KV(*stacks))

    def advance(self, counts: Int[Array, " b"]) -> Cache:
        """The cache after `counts` new tokens a row; slots beyond a row's length are overwritten later."""
        return replace(self, lengths=self.lengths + counts, empty=False)


def new_cache(config: ModelConfig, layout: Layout, rows: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` tokens a row."""

    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    sharding = layout.sharding(STACK_AXES, shape)
    kv = KV(jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding))
    return Cache(kv, jnp.zeros(rows, jnp.int32), layout, empty=True)


def _fill(stack: Array, layer: Array, new: Array) -> Array:
    """New keys or values [b, s, kv, h] of one layer in its first s slots."""
    return jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, 0, 0, 0))


def _attend(
    keys: Array,
    values: Array,
    q: Array,
    k: Array,
    v: Array,
    at: Array,
    number: Array,
    window: Array,
    *,
    spec: AttentionSpec,
) -> tuple[Array, Array, Array]:
    """One device's part."""
    keys, values = write_slots(keys, number, k, at), write_slots(values, number, v, at)
    return cached_attention(q, keys, values, number, at, window, spec), keys, values
