"""The optimiser of a model's own weights: a layer at a time, in place.

A stack of layers is updated by a loop that carries weights and moments: donated, they are overwritten where
they are, and temporaries are those of one layer. The layer-wise train step (`train/layerwise.py`) calls the
same functions from inside the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jora.kernels.counter_hash import fold_all
from jora.models.params import Layers, Params
from jora.optim.adam import apart
from jora.optim.galore import GaLore
from jora.optim.rounding import add
from jora.optim.stacked import init_stacked

# torch.nn.utils.clip_grad_norm_ adds this to the norm that it divides by.
CLIP_EPSILON = 1e-6


class ModelState(NamedTuple):
    """Optimiser state of a model: `layers` is stacked, `output` has the final norm and an untied head."""

    step: Int[Array, ""]
    embed: Any
    layers: Any
    output: Any


class Output(NamedTuple):
    """The trained weights behind the layers; None where frozen (or tied)."""

    final_norm: Float[Array, " d"] | None
    head: Float[Array, "v d"] | None


@dataclass(frozen=True, eq=False)
class Direct:
    """An optax transformation as a `GaLore` that projects nothing: what the parts of a step are without it."""

    inner: optax.GradientTransformation

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def refresh(self, gradients: Any, state: Any) -> Any:
        return state

    def project(self, gradients: Any, state: Any) -> Any:
        return gradients

    def apply(self, projected: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.inner.update(projected, state, params)


@dataclass(frozen=True, eq=False)
class ModelOptimizer:
    """`dense` gives directions for the tables and the final norm, `layer` for one layer's tree.

    rate: step number -> learning rate. weight_decay: decoupled, of every weight. max_norm: of the whole
    gradient, 0 for no clipping. layerwise: update inside the backward pass. clip_projected: there, take the
    norm of the projected gradients, never above the exact one.
    """

    dense: optax.GradientTransformation
    layer: GaLore | Direct
    rate: Callable[[Any], Any]
    weight_decay: float = 0.0
    max_norm: float = 0.0
    layerwise: bool = False
    clip_projected: bool = False

    def init(self, trained: Params) -> ModelState:
        """First state of the weights that train (None where frozen)."""
        return ModelState(
            jnp.zeros((), jnp.int32),
            self.dense.init(trained.embed),
            init_stacked(self.layer, trained.layers) if jax.tree.leaves(trained.layers) else None,
            self.dense.init(output_of(trained)),
        )

    def step(self, gradients: Params, state: ModelState, trained: Params) -> tuple[Params, ModelState, Array]:
        """One update from whole gradients: (weights, state, norm of the gradient)."""
        norm = norm_of(gradients)
        scale = self.clip_scale(norm)

        def project(layer_state: Any, number: Any, weights: Any) -> tuple[Any, Any]:
            gradient = take(gradients.layers, number)
            layer_state = self.layer.refresh(gradient, layer_state)
            return self.layer.project(gradient, layer_state), layer_state

        embed, embed_state = self.update_group(gradients.embed, state.embed, trained.embed, scale, state.step, 0)
        layers, layer_states = self.update_layers(project, state, trained.layers, scale)
        output, output_state = self.update_group(
            output_of(gradients), state.output, output_of(trained), scale, state.step, 1
        )
        weights = Params(embed, layers, output.final_norm, output.head)
        return weights, ModelState(state.step + 1, embed_state, layer_states, output_state), norm

    def update_layers(
        self, projected: Callable[[Any, Any, Any], tuple[Any, Any]], state: ModelState, layers: Layers, scale: Any
    ) -> tuple[Layers, Any]:
        """All layers in place; projected(state, number, weights) -> (projected gradient, state) of one layer."""
        if state.layers is None:
            return layers, None

        def one(carry: Any, number: Array) -> tuple[Any, None]:
            weights, states = take(carry, number)
            gradient, layer_state = projected(states, number, weights)
            new = self.update_layer(gradient, layer_state, weights, scale, state.step, number)
            return put(carry, new, number), None

        count = jax.tree.leaves(layers)[0].shape[0]
        return jax.lax.scan(one, (layers, state.layers), jnp.arange(count))[0]

    def update_layer(
        self, projected: Any, state: Any, weights: Any, scale: Any, count: Array, number: Array
    ) -> tuple[Any, Any]:
        """(weights, state) of one layer, from its projected gradient times `scale`."""

        def update(old: Any, projected: Any) -> Any:
            weights, state = old
            directions, state = self.layer.apply(scaled(projected, scale), state, weights)
            return self._move(weights, directions, count, number + 2), state

        return apart(update, number, (weights, state), projected)

    def update_group(
        self, gradients: Any, state: Any, weights: Any, scale: Any, count: Array, salt: int
    ) -> tuple[Any, Any]:
        """(weights, state) of what is outside the layers."""
        directions, state = self.dense.update(scaled(gradients, scale), state, weights)
        return self._move(weights, directions, count, salt), state

    def clip_scale(self, norm: Any) -> Any:
        """What gradients of this norm are multiplied by."""
        return jnp.minimum(1.0, self.max_norm / (norm + CLIP_EPSILON)) if self.max_norm else jnp.float32(1)

    def _move(self, weights: Any, directions: Any, count: Array, salt: Any) -> Any:
        rate = self.rate(count)
        structure: Any
        leaves, structure = jax.tree.flatten(weights)
        moved = [
            add(w, -rate * (d + self.weight_decay * w.astype(jnp.float32)), fold_all(count, salt, place))
            for place, (w, d) in enumerate(zip(leaves, jax.tree.leaves(directions), strict=True))
        ]
        return structure.unflatten(moved)


def output_of(params: Params) -> Output:
    return Output(params.final_norm, params.head)


def take(stack: Any, number: Any) -> Any:
    """One layer's slice of every leaf."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), stack)


def put(stack: Any, layer: Any, number: Any) -> Any:
    """The stack with one layer's slices replaced."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), number, 0), stack, layer
    )


def scaled(gradients: Any, scale: Any) -> Any:
    """The gradients times a factor, fp32."""
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)


def squares(tree: Any) -> Float[Array, ""]:
    """Sum of squares of all leaves, fp32."""
    return sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)), jnp.float32(0))


def norm_of(tree: Any) -> Float[Array, ""]:
    """Global L2 norm."""
    return jnp.sqrt(squares(tree))
