"""Batches from the host to the devices: in which order, and which axis of which array is cut how.

Shape legend: m micro-batches, b rows, s tokens a row, n answer positions a row, h width of a row's instance vector.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from jora.data.batches import Batch, Batches, BatchOptions, Shape, Step
from jora.models.head import Answers
from jora.sharding import Layout, hosts
from jora.train.options import TrainOptions
from jora.train.step import MicroBatches

# Row lengths are multiples of this: what vector units and attention blocks like.
LENGTH_MULTIPLE = 8

# Sizes (in letters of the legend) and dtype of each field; the letter b is the axis that the mesh cuts.
_FIELDS = {
    "tokens": ("mbs", np.int32),
    "positions": ("mbs", np.int32),
    "segments": ("mbs", np.int32),
    "answer_positions": ("mbn", np.int32),
    "answer_targets": ("mbn", np.int32),
    "answer_weights": ("mbn", np.float32),
    "row_ids": ("mb", np.int32),
    "instance": ("mbh", np.float32),
}


def batch_options(
    options: TrainOptions, layout: Layout, *, evaluation: bool = False, prompt_slots: int = 0
) -> BatchOptions:
    """How the data is cut into batches that the mesh divides."""
    return BatchOptions(
        rows=options.batch_size,
        accumulation=1 if evaluation else options.accumulation,
        max_length=options.max_length + prompt_slots,
        # The residual stream is cut along the sequence between blocks.
        multiple=math.lcm(LENGTH_MULTIPLE, layout.tensor_shards),
        packing=options.packing,
        row_multiple=layout.batch_shards,
        shuffle=not evaluation,
        prompt_slots=prompt_slots,
    )


class Schedule:
    """The steps of a run, by number: `steps` of them, or `epochs` passes over the data."""

    def __init__(self, batches: Batches, epochs: int, steps: int | None) -> None:
        self._batches = batches
        self._starts = [0]  # the first step of each epoch, and the end
        shapes: set[Shape] = set()
        while len(self._starts) <= epochs if steps is None else self._starts[-1] < steps:
            plan = batches.plan(len(self._starts) - 1)
            left = len(plan) if steps is None else steps - self._starts[-1]
            shapes.update(step.shape for step in plan[:left])
            self._starts.append(self._starts[-1] + len(plan))
        self.total = self._starts[-1] if steps is None else steps
        self.shapes = sorted(shapes, key=lambda s: s.rows * s.length + s.answers, reverse=True)

    def step(self, number: int) -> tuple[int, Step]:
        """(epoch, planned step) of a step number from 0."""
        epoch = bisect_right(self._starts, number) - 1
        return epoch, self._batches.plan(epoch)[number - self._starts[epoch]]

    def evaluation_is_due(self, finished: int, every: int | None) -> bool:
        """Whether to evaluate after this many steps: `every` so many, or after each epoch; and at the end."""
        if finished == self.total:
            return True
        return finished % every == 0 if every else finished in self._starts[1:]


def _gather(field: Callable[[str], Any], packed: bool) -> MicroBatches:
    answers = Answers(field("answer_positions"), field("answer_targets"), field("answer_weights"))
    # Without packing a row is one example, padded on the right: causal attention needs no segments.
    segments = field("segments") if packed else None
    return MicroBatches(
        field("tokens"), field("positions"), segments, answers, field("row_ids"), instance=field("instance")
    )


def _axes(sizes: str) -> tuple[str | None, ...]:
    return tuple("batch" if size == "b" else None for size in sizes)


def to_devices(
    batches: Sequence[Batch],
    layout: Layout,
    *,
    packed: bool,
    stacked: bool = True,
    instances: Float32[np.ndarray, "m b h"] | None = None,
) -> MicroBatches:
    """The micro-batches of one step on their devices; with `stacked` off the one batch, without axis m."""

    def field(name: str) -> jax.Array | None:
        value = instances if name == "instance" else np.stack([getattr(batch, name) for batch in batches])
        if value is None:
            return None
        sizes, _ = _FIELDS[name]
        value, sizes = (value, sizes) if stacked else (value[0], sizes[1:])
        return hosts.put(value, layout.sharding(_axes(sizes), value.shape))

    return _gather(field, packed)


def abstract_batches(
    shape: Shape,
    accumulation: int,
    layout: Layout,
    *,
    packed: bool,
    stacked: bool = True,
    instance_width: int = 0,
) -> MicroBatches:
    """What `to_devices` returns for batches of `shape`, as shapes, dtypes and shardings alone."""
    lengths = {"m": accumulation, "b": shape.rows, "s": shape.length, "n": shape.answers, "h": instance_width}

    def field(name: str) -> jax.ShapeDtypeStruct | None:
        sizes, dtype = _FIELDS[name]
        if not all(lengths[size] for size in sizes):
            return None
        sizes = sizes if stacked else sizes[1:]
        lengths_ = tuple(lengths[size] for size in sizes)
        return jax.ShapeDtypeStruct(lengths_, dtype, sharding=layout.sharding(_axes(sizes), lengths_))

    return _gather(field, packed)
