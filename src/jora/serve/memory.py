"""What goes where in a device's memory, and how large the page pool is when nobody says."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jora.encoders import open_encoder
from jora.errors import InputError
from jora.models.config import LINEARS, ModelConfig
from jora.models.model import Model
from jora.models.tensors import linear_shape
from jora.serve.options import EngineOptions
from jora.sharding import Layout
from jora.sharding.memory import USABLE, free_bytes

GIB = 1 << 30
# Of a host's memory, which other programs need too and which takes effect only when it is written: this share, and
# no more than so many bytes for all simulated devices.
HOST_SHARE, HOST_MOST = 0.5, 8 * GIB


@dataclass(frozen=True)
class Memory:
    """Bytes of each device. `steps` is an estimate: logits, the samplers' state and the largest activations."""

    weights: int
    pool: int
    active: int
    steps: int
    rest: int
    encoders: int = 0

    def parts(self) -> dict[str, int]:
        """The numbers under the names that a person is shown."""
        return {
            "weights": self.weights,
            "page pool": self.pool,
            "active adapters": self.active,
            "steps (estimate)": self.steps,
            **({"encoders": self.encoders} if self.encoders else {}),
            "left": self.rest,
        }


def plan(model: Model, options: EngineOptions) -> Memory:
    """How the memory of each device will be used, before pool and active set are made and encoders are loaded; the
    weights are there already.

    Raises:
        InputError: what is free does not hold `options.pool_bytes`, or any pool worth having, or an encoder is missing.
    """
    config, layout = model.config, model.layout
    active = active_bytes(config, layout, options, model.dtype.itemsize)
    steps = steps_bytes(config, layout, options, model.dtype.itemsize)
    encoders = encoder_bytes(options)
    free = free_bytes(layout)
    room = int(USABLE * free) - active - steps - encoders
    pool = _host_pool(room, layout) if _on_host(layout) else room
    if options.pool_bytes is not None:
        pool = -(-options.pool_bytes // layout.tensor_shards)
    if pool <= 0 or pool > free:
        reading = f", {encoders / GIB:.2f} for encoders" if encoders else ""
        raise InputError(
            f"no room for the page pool: {free / GIB:.2f} GiB free on a device, {active / GIB:.2f} of them for active "
            f"adapters, {steps / GIB:.2f} for steps{reading}; lower max_batch, chunk, the largest rank bucket or the "
            "pool's size"
        )
    return Memory(weight_bytes(model), pool, active, steps, free - pool - active - steps - encoders, encoders)


def with_pool(model: Model, options: EngineOptions) -> EngineOptions:
    """The options with the size of the pool, over all devices."""
    if options.pool_bytes is not None:
        return options
    return replace(options, pool_bytes=plan(model, options).pool * model.layout.tensor_shards)


def _on_host(layout: Layout) -> bool:
    return layout.mesh.devices.flat[0].platform == "cpu"


def _host_pool(room: int, layout: Layout) -> int:
    return min(int(HOST_SHARE * room), HOST_MOST // layout.tensor_shards)


def encoder_bytes(options: EngineOptions) -> int:
    """Bytes of the encoders' weights, which lie whole on one device; none are loaded where nobody has soft prompts."""
    return sum(open_encoder(name).nbytes for name in options.encoders) if options.soft_tokens else 0


def weight_bytes(model: Model) -> int:
    """Bytes of the base's weights on one device."""

    def on_device(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(on_device(leaf) for leaf in jax.tree.leaves(model.params))


def active_bytes(config: ModelConfig, layout: Layout, options: EngineOptions, itemsize: int) -> int:
    """Bytes of the active set on one device: A, B of the largest rank bucket and u, v of the largest product bucket."""
    products = max(options.product_buckets or (), default=0)
    vectors = max(options.rank_buckets, default=0) + (1 + products if products else 0)  # 1: what the base alone has
    widths = 0
    for target in LINEARS if options.targets is None else options.targets:
        shape = linear_shape(config, target)
        widths += _cut(shape.in_shape, shape.in_axes, layout) + _cut(shape.out_shape, shape.out_axes, layout)
    return config.layers * vectors * widths * itemsize


def _cut(shape: tuple[int, ...], axes: tuple[str | None, ...], layout: Layout) -> int:
    """Elements on one device; factors are whole along the model's width, and cut where heads and MLP are."""
    shards = (1 if axis in (None, "embed") else layout.axis_size(axis) for axis in axes)
    return math.prod(n // s if n % s == 0 else n for n, s in zip(shape, shards, strict=True))


def steps_bytes(config: ModelConfig, layout: Layout, options: EngineOptions, itemsize: int) -> int:
    """Estimate of what the programs need beside their arguments, on one device.

    Sampling: a row's logits, their sorted copy, its probabilities, and counts of prompt's and answer's tokens.
    Forward: the widest layer of a prefill chunk (or of a decode batch), and queries, keys and values. Soft prompts: of
    a whole batch.
    """
    shards = layout.tensor_shards
    word = np.dtype(np.float32).itemsize
    sampling = options.max_batch * config.padded_vocab * word * 5
    tokens = max(options.chunk, options.max_batch)
    width = 4 * config.embed + 3 * config.mlp // shards + 3 * config.heads * config.head_dim // shards
    soft = options.max_batch * (options.soft_tokens or 0) * config.embed * word
    return sampling + soft + tokens * width * (itemsize + word)
