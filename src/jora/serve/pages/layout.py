"""How the page pool is laid out: which layers share a page, and how large a page is. docs/serving.md has the reasons.

Shape legend: G layers of a group, P tokens of a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.models.config import LINEARS, LayerKind, ModelConfig
from jora.models.paged import POOL_AXES as POOL_AXES
from jora.models.tensors import linear_shape
from jora.sharding import Layout

# A page is at most this part of a small adapter, so that cutting an adapter into pages wastes little.
SMALL_RANK, PARTS = 8, 40


@dataclass(frozen=True)
class Group:
    """Consecutive layers of one kind, whose keys and values share pages. window: None where they see everything."""

    kind: LayerKind
    layers: tuple[int, ...]
    window: int | None


@dataclass(frozen=True)
class PoolLayout:
    """The shape of a pool's pages; hashable, so it can be a static argument.

    shards: tensor devices. elements: numbers of a page on one device, `[G, 2, P, its KV heads, head_dim]`; devices
    along `tensor_rep` hold the same KV heads.
    """

    groups: tuple[Group, ...]
    page_tokens: int
    group_layers: int
    shards: int
    elements: int
    dtype: str

    @classmethod
    def of(cls, config: ModelConfig, layout: Layout, dtype: Any, page_tokens: int) -> PoolLayout:
        """The pool of this model on this mesh. Raises InputError for a mesh that cuts more than heads and widths."""
        if layout.batch_shards > 1:
            raise InputError("serving cuts a model over tensor devices only; leave data and fsdp out of the mesh")
        one_layer = 2 * page_tokens * config.head_dim * config.kv_heads // layout.axis_size("kv_heads")
        most = adapter_elements(config, layout, SMALL_RANK) // PARTS
        counts = [config.layer_kinds.count(kind) for kind in config.kinds]
        divisors = (n for n in range(1, min(counts) + 1) if math.gcd(n, *counts) == n)
        size = max((n for n in divisors if n * one_layer <= most), default=1)
        groups = tuple(
            Group(kind, layers[at : at + size], config.window if kind == "sliding" else None)
            for kind in config.kinds
            for layers in [tuple(i for i, each in enumerate(config.layer_kinds) if each == kind)]
            for at in range(0, len(layers), size)
        )
        name = jnp.dtype(dtype).name
        return cls(groups, page_tokens, size, layout.tensor_shards, size * one_layer, name)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page over all devices."""
        return self.shards * self.elements * jnp.dtype(self.dtype).itemsize

    @cached_property
    def layer_group(self) -> tuple[int, ...]:
        """Layer -> number of its group."""
        return tuple(group for group, _ in self._places)

    @cached_property
    def layer_slot(self) -> tuple[int, ...]:
        """Layer -> its place within its group's pages."""
        return tuple(slot for _, slot in self._places)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        places = {
            layer: (number, slot) for number, group in enumerate(self.groups) for slot, layer in enumerate(group.layers)
        }
        return [places[layer] for layer in range(len(places))]

    def blocks(self, tokens: int) -> int:
        """Pages of one group that hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def first_block(self, group: int, position: int) -> int:
        """The first block of this group that a query at `position` sees; earlier ones may be returned."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.page_tokens

    def adapter_pages(self, elements: int) -> int:
        """Pages of an adapter whose stream has so many elements on each device."""
        return -(-elements // self.elements)

    def pages_in(self, pool_bytes: int) -> int:
        """Pages of a pool of so many bytes over all devices. Raises InputError where it has none to give."""
        count = pool_bytes // self.page_bytes
        if count < 2:
            raise InputError(f"a pool of {pool_bytes:,} bytes holds no page of {self.page_bytes:,}; make it larger")
        return count

    def new_pool(self, pages: int, layout: Layout) -> Float[Array, "pages shards elements"]:
        """An empty pool, cut over the tensor devices."""
        shape = (pages, self.shards, self.elements)
        return jnp.zeros(shape, self.dtype, device=pool_sharding(layout))


def pool_sharding(layout: Layout) -> NamedSharding:
    """Each tensor device holds its own shard of every page."""
    return layout.sharding(POOL_AXES)


def adapter_elements(config: ModelConfig, layout: Layout, rank: int) -> int:
    """Numbers on one device of a low-rank adapter of all linears."""
    total = 0
    for target in LINEARS:
        site = linear_shape(config, target)
        for shape, axes in ((site.in_shape, site.in_axes), (site.out_shape, site.out_axes)):
            total += rank * math.prod(layout.sharding(axes, shape).shard_shape(shape))
    return config.layers * total
