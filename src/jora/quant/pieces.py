"""How a linear layer's weight [*in, *out] lies in pieces on the devices of a mesh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jora.sharding import Layout
from jora.sharding.layout import mesh_axes

Where = Mapping[str, Any]  # a device's number along each mesh axis: ints, or traced inside a program


class Cut(NamedTuple):
    """One dimension: its length, the mesh axes that cut it, and into how many pieces."""

    size: int
    axes: tuple[str, ...]
    shards: int

    @property
    def local(self) -> int:
        """Length of a piece."""
        return self.size // self.shards


@dataclass(frozen=True)
class Pieces:
    """The pieces of a weight [*in, *out]; each device holds one, and equal ones along unused mesh axes."""

    mesh: Mesh
    ins: tuple[Cut, ...]
    outs: tuple[Cut, ...]

    @classmethod
    def of(cls, layout: Layout, shape: tuple[int, ...], axes: tuple[str | None, ...], outputs: int) -> Pieces:
        """Those of a weight with these logical axes, `outputs` of them its output's."""
        cuts = []
        for size, part in zip(shape, layout.spec(axes, shape), strict=True):
            names = mesh_axes([part])
            cuts.append(Cut(size, names, math.prod(layout.mesh.shape[name] for name in names)))
        at = len(cuts) - outputs
        return cls(layout.mesh, tuple(cuts[:at]), tuple(cuts[at:]))

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Of all dimensions, inputs first."""
        return self.ins + self.outs

    @property
    def rows(self) -> int:
        """Inputs, in all."""
        return math.prod(cut.size for cut in self.ins)

    @property
    def columns(self) -> int:
        """Outputs, in all."""
        return math.prod(cut.size for cut in self.outs)

    @property
    def local_rows(self) -> int:
        """Inputs of a piece."""
        return math.prod(cut.local for cut in self.ins)

    @property
    def local_columns(self) -> int:
        """Outputs of a piece."""
        return math.prod(cut.local for cut in self.outs)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """[*in, *out] of a piece."""
        return tuple(cut.local for cut in self.cuts)

    @property
    def run(self) -> int:
        """How many inputs of a piece follow one another in the whole weight; divides `local_rows`."""
        length = 1
        for cut in reversed(self.ins):
            length *= cut.local
            if cut.shards > 1:
                break
        return length

    @property
    def matrix_spec(self) -> PartitionSpec:
        """The partition of [pieces x rows, pieces x columns]."""
        return PartitionSpec(_joined(self.ins), _joined(self.outs))

    @property
    def matrix_shards(self) -> tuple[int, int]:
        """Into how many pieces inputs and outputs are cut."""
        return math.prod(cut.shards for cut in self.ins), math.prod(cut.shards for cut in self.outs)

    def spec(self, without: str | None = None) -> PartitionSpec:
        """The partition of [*in, *out], or that of the weight collected over mesh axis `without`."""
        return PartitionSpec(*(_joined([cut]) if without not in cut.axes else None for cut in self.cuts))

    def number(self, cuts: tuple[Cut, ...], where: Where) -> Any:
        """Which piece along these dimensions the device at `where` holds."""
        number: Any = 0
        for name in itertools.chain.from_iterable(cut.axes for cut in cuts):
            number = number * self.mesh.shape[name] + where[name]
        return number

    def indices(self, cuts: tuple[Cut, ...], where: Where, xp: Any = np) -> Any:
        """Flat indices, in the whole weight, of a piece's inputs or outputs; `xp` is numpy or jax.numpy."""
        found = xp.zeros((), xp.int32)
        for cut in cuts:
            found = found[..., None] * cut.size + self.number((cut,), where) * cut.local + xp.arange(cut.local)
        return found.reshape(-1)

    def each(self) -> Iterator[tuple[tuple[slice, ...], tuple[int, int], dict[str, int]]]:
        """Every piece: its box in [*in, *out], its number along inputs and outputs, and where it lies."""
        names = [name for cut in self.cuts for name in cut.axes]
        for place in itertools.product(*(range(self.mesh.shape[name]) for name in names)):
            where = dict(zip(names, place, strict=True))
            starts = (self.number((cut,), where) * cut.local for cut in self.cuts)
            box = tuple(slice(start, start + cut.local) for start, cut in zip(starts, self.cuts, strict=True))
            yield box, (self.number(self.ins, where), self.number(self.outs, where)), where


def _joined(cuts: Any) -> tuple[str, ...] | None:
    return tuple(name for cut in cuts for name in cut.axes) or None
