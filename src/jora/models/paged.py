"""The paged cache of serving: a row's keys and values lie in pages of a pool that all rows share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels.paged_attention import Table, paged_attention, write_pages
from jora.kernels.spec import AttentionSpec
from jora.models.cache import KV_AXES, Q_AXES, CachedLayer
from jora.sharding import Layout

POOL_AXES = (None, "pool_shards", None)


class PageShape(Protocol):
    """How layers share pages, as `jora.serve.pages.layout.PoolLayout` says it; hashable."""

    @property
    def page_tokens(self) -> int:
        """Tokens of a page."""

    @property
    def layer_group(self) -> tuple[int, ...]:
        """Layer -> its group; each group has its own pages."""

    @property
    def layer_slot(self) -> tuple[int, ...]:
        """Layer -> its place within its group's pages."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """One forward pass's view of the pool.

    tables: page of each block of tokens, by group; 0 where there is none. at: positions of the new tokens, -1 where
    a token is only padding.
    """

    pool: Float[Array, "pages shards elements"]
    tables: Int[Array, "groups b blocks"]
    at: Int[Array, "b s"]
    shape: PageShape = field(metadata={"static": True})
    layout: Layout = field(metadata={"static": True})

    def positions(self, count: int) -> Int[Array, "b s"]:
        assert count == self.at.shape[1]
        return self.at

    def attend(self, q: Array, k: Array, v: Array, layer: CachedLayer) -> tuple[Array, PagedCache]:
        group, slot = (jnp.array(x, jnp.int32)[layer.number] for x in (self.shape.layer_group, self.shape.layer_slot))
        arrays = (self.pool, q, k, v, self.tables[group], slot, self.at, layer.window)
        local = partial(_attend, page_tokens=self.shape.page_tokens, spec=layer.spec)
        # Heads are independent, and each device has its own in its part of the page: nothing is exchanged.
        axes = (POOL_AXES, Q_AXES, KV_AXES, KV_AXES, (None, None), (), (None, None), ())
        out, pool = self.layout.local(local, arrays, axes, [Q_AXES, POOL_AXES])
        return out, replace(self, pool=pool)


def _attend(
    pool: Array,
    q: Array,
    k: Array,
    v: Array,
    pages: Array,
    slot: Array,
    at: Array,
    window: Array,
    *,
    page_tokens: int,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    """One device's part."""
    table = Table(pages, slot, page_tokens)
    pool = write_pages(pool, k, v, table, at)
    return paged_attention(q, pool, table, at, window, spec), pool
