"""The arrays of all jobs on their devices: what exists, and moving one job in and out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jora.methods.bank import Bank, Kind, put, take
from jora.methods.method import State
from jora.models.model import Model
from jora.train.many.plan import abstract_state
from jora.train.many.step import KindState, Moments, first_moments
from jora.train.state import abstract_adapter


class KindArrays(NamedTuple):
    """The arrays of one kind, or their shapes with shardings."""

    state: KindState
    constant: Any


def abstract_job(kind: Kind, model: Model) -> State:
    """Shapes, dtypes and shardings of one job's arrays."""
    return abstract_adapter(kind.method, abstract_state(kind.method, model), model.config, model.layout)


def abstract_arrays(kind: Kind, model: Model) -> KindArrays:
    """Shapes, dtypes and shardings of a kind."""
    layout = model.layout
    whole = layout.sharding(())
    stacked = jax.tree.map(partial(_stacked, kind.jobs), abstract_state(kind.method, model))
    axes = Bank((kind,)).axes(model.config)
    trained, constant = jax.tree.map(
        lambda leaf, names: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.sharding(names, leaf.shape)),
        (stacked.trained, stacked.constant),
        (axes.trained[0], axes.constant[0]),
    )
    optimizer = Moments(trained, trained)
    step, alive = (jax.ShapeDtypeStruct((kind.jobs,), dtype, sharding=whole) for dtype in (jnp.int32, jnp.bool_))
    return KindArrays(KindState(trained, optimizer, step, alive), constant)  # type: ignore[arg-type]


def _stacked(jobs: int, leaf: Any) -> jax.ShapeDtypeStruct:
    axis = min(1, len(leaf.shape))
    return jax.ShapeDtypeStruct((*leaf.shape[:axis], jobs, *leaf.shape[axis:]), leaf.dtype)


def empty_arrays(abstract: KindArrays) -> KindArrays:
    """Zeros: places that no job has taken."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract), out_shardings=shardings
    )
    made: KindArrays = make()
    return made


class Moves(NamedTuple):
    """The compiled ways of a job into its kind's arrays and out of them."""

    enter: Callable[[KindArrays, Any, State], KindArrays]  # (arrays, place, first state); the arrays are donated
    leave: Callable[[KindArrays, Any], State]  # (arrays, place) -> a copy of the job's state


def moves(abstract: KindArrays, job: State) -> Moves:
    """For a kind and one of its jobs, both as shapes with shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (abstract, job))
    place = jax.ShapeDtypeStruct((), jnp.int32)

    def enter(arrays: KindArrays, place: Any, first: State) -> KindArrays:
        state = KindState(first.trained, first_moments(first.trained), jnp.int32(0), jnp.bool_(True))
        return KindArrays(put(arrays.state, place, state), put(arrays.constant, place, first.constant))

    def leave(arrays: KindArrays, place: Any) -> State:
        return State(take(arrays.state.trained, place), take(arrays.constant, place))

    into = jax.jit(enter, donate_argnums=0, out_shardings=shardings[0]).lower(abstract, place, job).compile()
    out = jax.jit(leave, out_shardings=shardings[1]).lower(abstract, place).compile()
    return Moves(
        lambda arrays, place, first: into(arrays, jnp.int32(place), _placed(first, job)),
        lambda arrays, place: out(arrays, jnp.int32(place)),
    )


def _placed(state: State, like: State) -> State:
    placed: State = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, like)
    return placed
