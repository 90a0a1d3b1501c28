"""The state of training on its devices: what exists, where, and its first value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jora.methods.method import Adapter, State
from jora.models.config import ModelConfig
from jora.optim.placement import place
from jora.sharding import Layout, hosts
from jora.train.step import TrainState


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_adapter(method: Any, state: State, config: ModelConfig, layout: Layout) -> State:
    """Shapes, dtypes and shardings of a method's arrays; `state` has arrays or their shapes."""
    return jax.tree.map(lambda leaf, axes: _placed(leaf, layout.sharding(axes, leaf.shape)), state, method.axes(config))


def abstract_train_state(trained: Any, optimizer: Any, layout: Layout) -> TrainState:
    """The whole training state for abstract `trained`; what an optimiser keeps of a leaf lies where the leaf lies."""
    whole = layout.sharding(())
    moments = place(jax.eval_shape(optimizer.init, trained), trained, whole, optimizer)
    return TrainState(trained, moments, _placed(jax.eval_shape(lambda: jnp.int32(0)), whole))


def first_train_state(adapter: Adapter, abstract: TrainState, optimizer: Any) -> TrainState:
    """Step 0. A copy of the adapter's arrays: the train step donates its state, the caller keeps the adapter.

    A method that trains in place gives up the model's own arrays instead.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    take = (lambda x: x) if adapter.method.in_place else jnp.copy
    trained = jax.tree.map(lambda x, s: hosts.put(take(x), s), adapter.state.trained, shardings.trained)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    return TrainState(trained, moments, hosts.put(np.int32(0), shardings.step))


def placement(abstract: TrainState, layout: Layout) -> tuple[Any, ...] | None:
    """The shardings of the state's leaves, for `Program`; None on one device, where there is nothing to say."""
    return None if layout.devices == 1 else tuple(leaf.sharding for leaf in jax.tree.leaves(abstract))
