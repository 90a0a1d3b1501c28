"""One optimiser for a stack of layers: leaves [layers, ...], each layer on its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jora.optim.galore import GaLoreState


def stacked(inner: Any) -> optax.GradientTransformation:
    """`inner` for each slice of leaves [layers, ...]; its state gains that axis.

    Layers are taken in turn (a scan), so that what a layer does conditionally costs nothing in the others,
    and temporaries are those of one layer. inner: an optax transformation or a `GaLore`.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(_: None, layer: Any) -> tuple[None, Any]:
            return None, inner.update(*layer)

        return jax.lax.scan(one, None, (gradients, state, params))[1]

    return optax.GradientTransformation(lambda params: init_stacked(inner, params), update)


def init_stacked(inner: Any, params: Any) -> Any:
    """The states of all layers, numbered."""
    state = jax.vmap(inner.init)(params)
    return jax.tree.map(_number, state, is_leaf=lambda node: isinstance(node, GaLoreState))


def _number(node: Any) -> Any:
    return node._replace(number=jnp.arange(len(node.number))) if isinstance(node, GaLoreState) else node
