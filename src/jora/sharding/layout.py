"""Logical axes: every array names its axes, one table maps the names onto the mesh.

Users see three mesh axes: `data` (rows of the batch), `fsdp` (rows of the batch, and the frozen weights
sharded beside them) and `tensor` (heads, MLP width, vocabulary). `tensor` is two hidden axes,
`tensor_kv` = gcd(tensor, kv_heads) and `tensor_rep`: query heads are laid out [kv, group], kv over
`tensor_kv` and group over `tensor_rep`, so fewer KV heads than devices cost no collective on K or V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor_kv", "tensor_rep")
TENSOR = ("tensor_kv", "tensor_rep")

# Logical axis -> mesh axes. An axis that is not listed is whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "batch_gathered": ("data",),  # rows at the head: gathered over fsdp, which cuts the vocabulary there
    "seq_sharded": TENSOR,  # the residual stream between blocks (sequence parallelism)
    "embed": ("fsdp",),  # the model width of a *frozen weight*; activations keep it whole
    "kv_heads": ("tensor_kv",),
    "q_group": ("tensor_rep",),
    "mlp": TENSOR,
    # The vocabulary is cut over fsdp too: hidden states that reach the head are few (answers only), so
    # gathering them is far cheaper than gathering the table.
    "vocab": ("fsdp", *TENSOR),
    "pool_shards": TENSOR,  # serving's pages: a part for every device
}


@dataclass(frozen=True)
class Layout:
    """A mesh and the rules: turns logical axes into shardings. Hashable, so it can be a static argument."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: RULES, hash=False, compare=False)

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def batch_shards(self) -> int:
        """Rows of a batch must be a multiple of this."""
        return math.prod(self.mesh.shape[a] for a in self.rules["batch"])

    @property
    def tensor_shards(self) -> int:
        return math.prod(self.mesh.shape[a] for a in TENSOR)

    def axis_size(self, logical: str) -> int:
        """Number of shards of a logical axis."""
        return math.prod(self.mesh.shape[a] for a in self.rules.get(logical, ()))

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> PartitionSpec:
        """The partition of an array with these logical axes.

        With `shape`, an axis whose length the mesh does not divide stays whole: the result is the same,
        only less is shared out. Two axes of one array never use the same mesh axis (ValueError).
        """
        parts: list[Any] = []
        used: set[str] = set()
        for position, axis in enumerate(axes):
            mesh_axes = self.rules.get(axis or "", ())
            if shape is not None and mesh_axes and shape[position] % self.axis_size(axis or ""):
                mesh_axes = ()
            if used & set(mesh_axes):
                raise ValueError(f"logical axes {axes} use a mesh axis twice: {sorted(used & set(mesh_axes))}")
            used |= set(mesh_axes)
            parts.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
        return PartitionSpec(*parts)

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Ask the compiler to lay `x` out like this; nothing on a single device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def constrain_gradient(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """`x` as it is; its gradient laid out like this, once, for all that use it."""
        if self.mesh.size == 1:
            return x
        sharding = self.sharding(axes, x.shape)
        identity = jax.custom_vjp(lambda x: x)
        identity.defvjp(
            lambda x: (x, None), lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, sharding),)
        )
        return identity(x)

    def local(self, function: Callable[..., Any], arrays: Sequence[Any], axes: Sequence[Any], out: Any) -> Any:
        """Run `function` on each device's own part of `arrays`, for work that needs no communication.

        axes: logical axes of each array, out: of the result, a list of them for several results. None arrays are
        passed through. The compiler is given no choice here; left to itself it may move activations between devices.
        """
        if self.mesh.size == 1:
            return function(*arrays)
        present = [i for i, array in enumerate(arrays) if array is not None]
        in_specs = tuple(self.spec(axes[i], arrays[i].shape) for i in present)

        def on_shards(*shards: jax.Array) -> Any:
            full: list[Any] = [None] * len(arrays)
            for i, shard in zip(present, shards, strict=True):
                full[i] = shard
            return function(*full)

        made = jax.eval_shape(function, *arrays)
        out_specs: Any = self.spec(out, made.shape) if isinstance(out, tuple) else _specs(self, out, made)
        mapped = jax.shard_map(on_shards, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*(arrays[i] for i in present))

    def is_cut(self, axes: tuple[str | None, ...], shape: tuple[int, ...], logical: str) -> bool:
        """Is an array of this shape really cut along this logical axis?"""
        if logical not in axes or self.axis_size(logical) == 1:
            return False
        return shape[axes.index(logical)] % self.axis_size(logical) == 0

    def gather_shards(self, weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Collect a weight that is cut along "embed" over fsdp: [f, ..., embed / f, ...], f outermost."""
        spec = self.spec(axes, weight.shape)
        others = (None if axis == "embed" else part for axis, part in zip(axes, spec, strict=True))
        return jax.shard_map(
            lambda shard: jax.lax.all_gather(shard, "fsdp", axis=0),
            mesh=self.mesh,
            in_specs=spec,
            out_specs=PartitionSpec(None, *others),
            check_vma=False,
        )(weight)


def _specs(layout: Layout, axes: Sequence[Any], arrays: Sequence[Any]) -> tuple[PartitionSpec, ...]:
    return tuple(layout.spec(each, array.shape) for each, array in zip(axes, arrays, strict=True))


def mesh_axes(parts: Iterable[Any]) -> tuple[str, ...]:
    """The mesh axes of a partition (a PartitionSpec, or some of its parts), in order."""
    return tuple(name for part in parts if part is not None for name in ((part,) if isinstance(part, str) else part))


def single_device(device: jax.Device | None = None) -> Layout:
    """The layout of one device: every axis has length one."""
    return Layout(jax.make_mesh((1, 1, 1, 1), MESH_AXES, devices=[device or jax.devices()[0]], axis_types=_auto()))


def _auto() -> tuple[Any, ...]:
    # jax >= 0.10 may default to Explicit axes; the rules above are written for the compiler's propagation.
    return (jax.sharding.AxisType.Auto,) * len(MESH_AXES)


def make_layout(data: int, fsdp: int, tensor_kv: int, tensor_rep: int, devices: list[jax.Device]) -> Layout:
    sizes = (data, fsdp, tensor_kv, tensor_rep)
    return Layout(jax.make_mesh(sizes, MESH_AXES, devices=devices[: math.prod(sizes)], axis_types=_auto()))
