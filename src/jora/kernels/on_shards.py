"""A function of each device's own parts, whose gradients are summed over devices once.

As `Layout.local`, but with what the backward pass exchanges written down: the gradient of an array is summed over
those mesh axes that cut the work and not the array, after all uses of the array in the function are added up. (The
transpose of a `shard_map` that does not track what differs between devices sums over every axis that the array is
not cut by, and sums a `psum`'s gradient, which is whole on all devices, once more.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array

from jora.sharding import Layout
from jora.sharding.layout import mesh_axes

Axes = Sequence[str | None]


def on_shards(
    function: Callable[..., Array],
    layout: Layout,
    arrays: Sequence[Array],
    axes: Sequence[Axes],
    out_axes: Axes,
    out_shape: Sequence[int],
) -> Array:
    """function(*arrays) on the devices' parts of them.

    axes: logical axes of each array. out_axes, out_shape: of the result, over all devices. Mesh axes that cut an
    array and not the result must be summed over (`jax.lax.psum`) in the function.
    """
    if layout.devices == 1:
        return function(*arrays)
    specs = tuple(layout.spec(tuple(a), x.shape) for a, x in zip(axes, arrays, strict=True))
    cutting = {name for spec in specs for name in mesh_axes(spec)}

    def own(*shards: Array) -> Array:
        return function(*(_differing(x, cutting - {*mesh_axes(s)}) for x, s in zip(shards, specs, strict=True)))

    mapped: Callable[..., Array] = jax.shard_map(
        own, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec(tuple(out_axes), tuple(out_shape))
    )
    return mapped(*arrays)


def _differing(x: Array, axes: set[str]) -> Array:
    """x, which is the same along these mesh axes, as if it were not: here its gradient is summed over them."""
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x
