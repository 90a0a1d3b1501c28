"""The state of training on its devices: what exists, where, and its first value."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jora.methods.method import Adapter, State
from jora.models.config import ModelConfig
from jora.sharding import Layout
from jora.train.step import TrainState


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_adapter(method: Any, state: State, config: ModelConfig, layout: Layout) -> State:
    """Shapes, dtypes and shardings of a method's arrays; `state` has arrays or their shapes."""
    return jax.tree.map(lambda leaf, axes: _placed(leaf, layout.sharding(axes, leaf.shape)), state, method.axes(config))


def abstract_train_state(trained: Any, optimizer: optax.GradientTransformation, layout: Layout) -> TrainState:
    """The whole training state for abstract `trained`; moments lie where their parameters lie."""
    whole = layout.sharding(())
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, parameter: _placed(leaf, parameter.sharding),
        jax.eval_shape(optimizer.init, trained),
        trained,
        transform_non_params=lambda leaf: _placed(leaf, whole),
    )
    return TrainState(trained, moments, _placed(jax.eval_shape(lambda: jnp.int32(0)), whole))


def first_train_state(adapter: Adapter, abstract: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0. A copy of the adapter's arrays: the train step donates its state, the caller keeps the adapter."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    trained = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), adapter.state.trained, shardings.trained)
    moments = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trained)
    return TrainState(trained, moments, jax.device_put(jnp.int32(0), shardings.step))
