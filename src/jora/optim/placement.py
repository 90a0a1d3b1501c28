"""Where optimiser state lies on a mesh: with the weight that it belongs to, and cut wherever that is cut.

GaLore's projected axis takes the place of several: P [*side, r] keeps the cuts of its side, and its rank is
cut over the mesh axes of the other side; R the other way round. So both are shared out like the weight.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jora.models.params import Params
from jora.optim.adam import path_name
from jora.optim.blockwise import Quantised
from jora.optim.galore import GaLore, GaLoreState
from jora.optim.model import ModelOptimizer, ModelState, output_of
from jora.optim.projection import Int8Columns, Side


def place(state: Any, params: Any, whole: NamedSharding, optimizer: Any = None) -> Any:
    """The abstract `state` with shardings, for abstract `params` that have theirs; whatever else is `whole`."""
    if isinstance(state, ModelState):
        assert isinstance(optimizer, ModelOptimizer) and isinstance(params, Params)
        layers = None
        if state.layers is not None:
            layers = _stack(place(_layer(state.layers), _layer(params.layers), whole, optimizer.layer), state.layers)
        return ModelState(
            _at(state.step, whole),
            place(state.embed, params.embed, whole),
            layers,
            place(state.output, output_of(params), whole),
        )
    if isinstance(state, GaLoreState):
        assert isinstance(optimizer, GaLore)
        return _place_galore(state, params, whole, optimizer)
    own: Any = jax.tree.structure(state, is_leaf=_is_moment)
    if own == jax.tree.structure(params):
        return jax.tree.map(lambda m, p: _moment(m, p, whole), state, params, is_leaf=_is_moment)
    if isinstance(state, tuple):
        parts = [place(part, params, whole) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return jax.tree.map(lambda leaf: _at(leaf, whole), state)


def _is_moment(node: Any) -> bool:
    return isinstance(node, Quantised)


def _at(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _layer(stack: Any) -> Any:
    """One layer of abstract leaves [layers, ...]."""

    def one(leaf: Any) -> Any:
        shape = leaf.shape[1:]
        if leaf.sharding is None:
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        sharding = NamedSharding(leaf.sharding.mesh, PartitionSpec(*_parts(leaf)[1:]))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, stack)


def _stack(placed: Any, stack: Any) -> Any:
    """The shardings of one layer for leaves [layers, ...]; the layers are not cut."""

    def one(leaf: Any, whole_stack: Any) -> Any:
        spec = PartitionSpec(None, *_parts(leaf))
        return _at(whole_stack, NamedSharding(leaf.sharding.mesh, spec))

    return jax.tree.map(one, placed, stack)


def _parts(leaf: Any) -> tuple[Any, ...]:
    """The partition of each axis."""
    spec = tuple(leaf.sharding.spec)
    return spec + (None,) * (len(leaf.shape) - len(spec))


def _moment(moment: Any, param: Any, whole: NamedSharding) -> Any:
    """What an optimiser keeps for one parameter; a number beside a single parameter is none of its moments."""
    if not isinstance(moment, Quantised):
        return _at(moment, param.sharding if moment.shape == param.shape else whole)
    kept = _parts(param)[: len(moment.absmax.shape) - 1]
    absmax = NamedSharding(param.sharding.mesh, PartitionSpec(*kept, None))
    return Quantised(_at(moment.codes, param.sharding), _at(moment.absmax, absmax))


def _place_galore(state: GaLoreState, params: Any, whole: NamedSharding, optimizer: GaLore) -> GaLoreState:
    sides = optimizer.sides(params)
    projectors = {}
    by_name = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    specs = {name: _projected_specs(side, by_name[name]) for name, side in sides.items()}
    for name, p in state.projectors.items():
        mesh, spec = by_name[name].sharding.mesh, specs[name][0]
        if isinstance(p, Int8Columns):
            scale = NamedSharding(mesh, PartitionSpec(spec[-1]))
            projectors[name] = Int8Columns(_at(p.codes, NamedSharding(mesh, spec)), _at(p.scale, scale))
        else:
            projectors[name] = _at(p, NamedSharding(mesh, spec))

    def projected(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name not in sides:
            return leaf
        sharding = NamedSharding(leaf.sharding.mesh, specs[name][1])
        return jax.ShapeDtypeStruct(sides[name].projected_shape, leaf.dtype, sharding=sharding)

    shadow = jax.tree_util.tree_map_with_path(projected, params)
    return GaLoreState(_at(state.step, whole), _at(state.number, whole), projectors, place(state.inner, shadow, whole))


def _projected_specs(side: Side, weight: Any) -> tuple[PartitionSpec, PartitionSpec]:
    """Of P and of R."""
    parts = _parts(weight)
    inputs, outputs = parts[: side.inputs], parts[side.inputs :]
    shape = weight.sharding.mesh.shape
    own, other = (inputs, outputs) if side.projects_input else (outputs, inputs)

    def rank_cut(parts: tuple[Any, ...]) -> Any:
        axes = tuple(a for part in parts if part for a in (part if isinstance(part, tuple) else (part,)))
        return (axes or None) if side.rank % math.prod(shape[a] for a in axes) == 0 else None

    p = PartitionSpec(*own, rank_cut(other))
    r = PartitionSpec(rank_cut(own), *outputs) if side.projects_input else PartitionSpec(*inputs, rank_cut(own))
    return p, r
