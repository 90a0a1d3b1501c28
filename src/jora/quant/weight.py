"""A quantised weight on the devices, and how one layer of it becomes dense again."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jora.quant.pieces import Pieces, Where
from jora.sharding.layout import mesh_axes

Kind = Literal["int8", "nf4"]

FSDP = "fsdp"  # the mesh axis over which a weight is collected before it is used


class Field(NamedTuple):
    """One array of a quantised weight (of one layer): its shape, dtype and partition over the mesh."""

    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec


@dataclass(frozen=True)
class QuantisedWeight:
    """A linear layer's weight in few bits; arrays gain a leading layer axis outside the scan.

    shape: [*in, *out] of one layer's dense weight.
    """

    kind: ClassVar[Kind]
    shape: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    @abstractmethod
    def fields(cls, pieces: Pieces) -> dict[str, Field]:
        """Its arrays, by attribute."""

    @staticmethod
    @abstractmethod
    def restore(pieces: Pieces, dtype: Any, where: Where, *arrays: Array) -> Float[Array, "..."]:
        """A device's piece [*in, *out] of the dense weight, from its own parts of the arrays."""

    @classmethod
    def abstract(cls, layers: int, shape: tuple[int, ...], pieces: Pieces) -> Any:
        """A stack's shapes, dtypes and shardings, without memory."""
        arrays = {}
        for name, f in cls.fields(pieces).items():
            sharding = NamedSharding(pieces.mesh, PartitionSpec(None, *f.spec))
            arrays[name] = jax.ShapeDtypeStruct((layers, *f.shape), f.dtype, sharding=sharding)
        return cls(shape=shape, **arrays)

    def dequantise(self, pieces: Pieces, dtype: Any, *, collect: bool) -> Float[Array, "..."]:
        """The dense weight [*in, *out] of one layer; computed in fp32 and rounded to `dtype`.

        It is cut as the devices' pieces are. collect: whole along fsdp, as a product needs it; the few bits
        travel, not the dense weight.
        """
        fields = self.fields(pieces)
        arrays = [getattr(self, name) for name in fields]
        restore = partial(self.restore, pieces, dtype)
        mesh = pieces.mesh
        if mesh.size == 1:
            return restore(dict.fromkeys(mesh.axis_names, 0), *arrays)
        position = next((i for i, cut in enumerate(pieces.cuts) if FSDP in cut.axes and cut.shards > 1), None)
        collect = collect and position is not None
        cut = [FSDP in mesh_axes(f.spec) for f in fields.values()]

        def on_device(*parts: Array) -> Array:
            where = {name: jax.lax.axis_index(name) for name in mesh.axis_names}
            if not collect:
                return restore(where, *parts)
            assert position is not None
            # Shards on a new outermost axis, as for dense weights: see `Layout.gather_shards`.
            gathered = [jax.lax.all_gather(p, FSDP, axis=0) if c else p for p, c in zip(parts, cut, strict=True)]

            def one(number: Array, *shards: Array) -> Array:
                return restore({**where, FSDP: number}, *shards)

            numbers = jnp.arange(mesh.shape[FSDP])
            restored = jax.vmap(one, (0, *(0 if c else None for c in cut)))(numbers, *gathered)
            shape = list(pieces.local_shape)
            shape[position] = pieces.cuts[position].size
            return jnp.moveaxis(restored, 0, position).reshape(shape)

        mapped = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=tuple(f.spec for f in fields.values()),
            out_specs=pieces.spec(FSDP if collect else None),
            check_vma=False,
        )
        return mapped(*arrays)
