"""An adapter as one stream of numbers a device, which pages cut without regard to layers (docs/serving.md).

In the order of the targets, each device's own part of

    a [L, r, *in]   b [L, r, *out]   u [L, j, *in]   v [L, j, *out]

where a target has a low-rank part (rank r) and base products (j). What a device's part is follows from the training
layout: along heads and MLP width factors are cut as the weights are, along the model width they are whole.

Shape legend: L layers, r rank, j base products, *in and *out dimensions of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Shaped

from jora.errors import InputError
from jora.methods.lora import site_shape
from jora.methods.served import Served
from jora.models.config import LINEARS, ModelConfig
from jora.sharding import Layout


class TargetSpec(NamedTuple):
    """Sizes of one target's part: its rank and its base products; one of them may be 0."""

    target: str
    rank: int
    products: int


@dataclass(frozen=True)
class Spec:
    """The shape of one adapter. targets: those that it changes, in the order of `LINEARS`."""

    targets: tuple[TargetSpec, ...] = ()
    scales_bias: bool = False

    @property
    def rank(self) -> int:
        """Ranks that the adapter takes in the active set: its largest."""
        return max((target.rank for target in self.targets), default=0)

    @property
    def products(self) -> int:
        """The same for base products."""
        return max((target.products for target in self.targets), default=0)

    def check(self, name: str, targets: Collection[str], ranks: int, products: int) -> None:
        """Raise InputError where the adapter `name` needs targets, ranks or base products that are not served."""
        if other := [each.target for each in self.targets if each.target not in targets]:
            raise InputError(
                f"adapter {name} changes {other[0]}, but the server was started for {', '.join(targets) or 'none'};"
                " name it in targets"
            )
        if self.rank > ranks:
            raise InputError(f"adapter {name}: rank {self.rank} is above {ranks}, the largest of rank_buckets")
        if self.products > products:
            raise InputError(
                f"adapter {name}: its {self.products} base products are above {products}, the largest of"
                " product_buckets"
            )
        if self.rank and self.products > 1:
            raise InputError(f"adapter {name}: low-rank factors beside {self.products} base products are not served")


def spec_of(served: Served) -> Spec:
    """The shape of an adapter."""
    found = []
    for target in LINEARS:
        low_rank, products = served.low_rank.get(target), served.products.get(target)
        if low_rank is not None or products is not None:
            rank = 0 if low_rank is None else low_rank.a.shape[1]
            found.append(TargetSpec(target, rank, 0 if products is None else products.u.shape[1]))
    return Spec(tuple(found), served.scales_bias)


class Part(NamedTuple):
    """One array of an adapter or of the active set. shape: over all devices; axes: logical."""

    target: str
    name: str  # "a", "b", "u" or "v"
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def sharding(self, layout: Layout) -> NamedSharding:
        return layout.sharding(self.axes, self.shape)

    def local(self, layout: Layout) -> tuple[int, ...]:
        """Its shape on one device."""
        shape: tuple[int, ...] = self.sharding(layout).shard_shape(self.shape)
        return shape


def target_parts(config: ModelConfig, target: TargetSpec) -> Iterator[Part]:
    """The arrays of one target, in the stream's order."""
    site = site_shape(config, target.target)
    ends = ((site.in_shape, site.in_axes), (site.out_shape, site.out_axes))
    for names, count in (("ab", target.rank), ("uv", target.products)):
        if count:
            for name, (shape, axes) in zip(names, ends, strict=True):
                yield Part(target.target, name, (config.layers, count, *shape), (None, None, *axes))


def parts(spec: Spec, config: ModelConfig) -> list[Part]:
    """All arrays of an adapter, in the stream's order."""
    return [part for target in spec.targets for part in target_parts(config, target)]


def elements(spec: Spec, config: ModelConfig, layout: Layout) -> int:
    """Numbers of the stream on each device."""
    return sum(math.prod(part.local(layout)) for part in parts(spec, config))


def pack(
    served: Served, config: ModelConfig, layout: Layout, dtype: Any, name: str = "adapter"
) -> Shaped[np.ndarray, "shards elements"]:
    """The stream of every tensor device. Raises InputError for numbers that `dtype` cannot hold."""
    spec = spec_of(served)
    devices = layout.mesh.devices.reshape(-1)
    stream = np.empty((devices.size, elements(spec, config, layout)), jnp.dtype(dtype))
    at = 0
    for part in parts(spec, config):
        array = _array(served, part)
        size = math.prod(part.local(layout))
        where = part.sharding(layout).devices_indices_map(part.shape)
        with np.errstate(over="ignore"):  # found below
            for shard, device in enumerate(devices):
                stream[shard, at : at + size] = array[where[device]].reshape(-1)
        at += size
    # An overflow to infinity in one adapter would spoil the other rows of its batch: 0 x inf is no number.
    if not np.isfinite(stream).all():
        raise InputError(f"{name}: its factors are beyond what {jnp.dtype(dtype).name} holds; train the adapter again")
    return stream


def _array(served: Served, part: Part) -> np.ndarray:
    pairs = served.low_rank if part.name in "ab" else served.products
    array: np.ndarray = getattr(pairs[part.target], part.name)
    if array.shape != part.shape:
        raise ValueError(f"{part.target}.{part.name} is {array.shape}, the model's is {part.shape}")
    return array
