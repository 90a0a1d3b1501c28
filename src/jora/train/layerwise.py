"""A step whose gradients exist one layer at a time: the backward pass is a scan of our own.

The forward pass keeps each layer's input. The backward pass takes the layers in reverse: a layer is computed
again, its gradients are taken, used and dropped before the next one's are made. Weights and moments travel
in that scan's carry, and so are overwritten in place.

accumulation 1, exact clipping    two passes: the first only sums squares of gradients (twice the compute)
accumulation 1, no clipping       one pass, which updates
otherwise (GaLore)                passes that refresh P (first micro-batch only), project, and add R; then a
                                  loop over the layers updates

Legend: m micro-batches, b rows, s tokens, d width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.methods.full import merge, merge_layers
from jora.models import decoder
from jora.models.adapted import BASE, Rows
from jora.models.head import answer_loss
from jora.models.params import Layers, Params
from jora.optim.model import ModelOptimizer, ModelState, Output, output_of, put, squares, take


class Visitor(NamedTuple):
    """What a backward pass does with the gradients, in the order in which they come.

    layers: carry -> the stacked trained layers, as they are at this moment. output, embed: (carry, gradient) ->
    carry. layer: (carry, number, weights, gradient) -> carry.
    """

    layers: Callable[[Any], Layers]
    output: Callable[[Any, Output], Any]
    layer: Callable[[Any, Any, Any, Any], Any]
    embed: Callable[[Any, Any], Any]


class Sums(NamedTuple):
    """Over micro-batches: projected gradients (`layers` stacked), and the states with the P that projected."""

    embed: Any
    layers: Any
    output: Output
    states: Any


def layerwise_update(
    state: Any, rest: Params, batches: Any, seeds: Any, program: Any
) -> tuple[Float[Array, ""], Float[Array, ""], Params, ModelState]:
    """(loss, norm of the gradient, weights, optimiser state) after one step of `step.train_step`'s arguments.

    The norm is that of the projected gradients where those are accumulated.
    """
    optimizer: ModelOptimizer = program.optimizer
    total = jnp.maximum(jnp.sum(batches.answers.weights), 1e-9)
    sweep = partial(_backward, state.trained, rest, total=total, program=program)
    only = jax.tree.map(lambda x: x[0], (batches, seeds))
    if batches.tokens.shape[0] > 1 or optimizer.clip_projected:
        return _accumulated(state, sweep, batches, seeds, optimizer)
    scale = jnp.float32(1)
    if optimizer.max_norm:
        _, total_squares = sweep(*only, carry=jnp.float32(0), visitor=_squares_visitor(state.trained))
        scale = optimizer.clip_scale(jnp.sqrt(total_squares))
    loss, (norm_squares, weights, moments) = sweep(
        *only, carry=(jnp.float32(0), state.trained, state.optimizer), visitor=_update_visitor(optimizer, scale)
    )
    return loss, jnp.sqrt(norm_squares), weights, moments._replace(step=moments.step + 1)


def _backward(
    trained: Params, rest: Params, batch: Any, row_seeds: Any, *, total: Any, program: Any, carry: Any, visitor: Visitor
) -> tuple[Float[Array, ""], Any]:
    """(loss over `total`, carry) of one micro-batch; the visitor is given every gradient, and keeps what it wants."""
    config, layout = program.config, program.layout
    rows, params = Rows(row_seeds), merge(trained, rest)
    context = decoder.context_of(config, layout, batch.positions, batch.segments, rows)
    numbers, kinds = decoder.layer_numbers(config)
    tokens = layout.constrain(batch.tokens, "batch", None)

    def embed(table: Array) -> Array:
        vectors = decoder._embed(merge(_outside(embed=table), params), tokens, context, BASE)
        return layout.constrain(vectors, "batch", "seq_sharded", None)

    def block(x: Array, weights: Layers, frozen: Layers, number: Array, kind: Array) -> Array:
        return decoder._block(x, merge_layers(weights, frozen), {}, number, kind, None, context=context)[0]

    def output(x: Array, weights: Output, table: Array | None) -> Array:
        """`table`: the embedding, where it trains as the output layer too."""
        mine = merge(_outside(table, weights.final_norm, weights.head), params)
        hidden = decoder.rms_norm(x, mine.final_norm, config)
        return answer_loss(mine, config, layout, hidden, batch.answers, BASE, rows)[0] / total

    tied = None if params.head is not None else trained.embed
    x = embed(params.embed)
    trained_layers = visitor.layers(carry)
    x, inputs = jax.lax.scan(
        lambda x, xs: (block(x, *xs), x), x, (trained_layers, rest.layers, numbers, kinds), length=config.layers
    )
    loss, pull = jax.vjp(output, x, output_of(trained), tied)
    dx, d_output, d_tied = pull(jnp.ones_like(loss))
    carry = visitor.output(carry, d_output)

    def step(state: Any, xs: Any) -> tuple[Any, None]:
        dx, carry = state
        x, number, kind = xs
        weights, frozen = take(visitor.layers(carry), number), take(rest.layers, number)
        _, pull = jax.vjp(lambda x, w: block(x, w, frozen, number, kind), x, weights)
        dx, gradient = pull(dx)
        return (dx, visitor.layer(carry, number, weights, gradient)), None

    (dx, carry), _ = jax.lax.scan(step, (dx, carry), (inputs, numbers, kinds), reverse=True)
    if trained.embed is not None:
        _, pull = jax.vjp(embed, trained.embed)
        (d_embed,) = pull(dx)
        carry = visitor.embed(carry, d_embed if d_tied is None else d_embed + d_tied)
    return loss, carry


def _outside(embed: Any = None, final_norm: Any = None, head: Any = None) -> Params:
    """Weights outside the layers, some of them."""
    return Params(embed, Layers({}, {}, {}), final_norm, head)


def _squares_visitor(trained: Params) -> Visitor:
    """The carry is the sum of squares."""

    def add(carry: Any, *rest: Any) -> Any:
        return carry + squares(rest[-1])

    return Visitor(lambda carry: trained.layers, add, add, add)


def _update_visitor(optimizer: ModelOptimizer, scale: Any) -> Visitor:
    """The carry is (sum of squares, weights, optimiser state): each gradient is used as soon as it exists."""

    def output(carry: Any, gradient: Output) -> Any:
        total, weights, state = carry
        new, moments = optimizer.update_group(gradient, state.output, output_of(weights), scale, state.step, 1)
        weights = Params(weights.embed, weights.layers, new.final_norm, new.head)
        return total + squares(gradient), weights, state._replace(output=moments)

    def layer(carry: Any, number: Any, old: Any, gradient: Any) -> Any:
        total, weights, state = carry
        total = total + squares(gradient)
        if state.layers is None:
            return carry
        moments = optimizer.layer.refresh(gradient, take(state.layers, number))
        projected = optimizer.layer.project(gradient, moments)
        new, moments = optimizer.update_layer(projected, moments, old, scale, state.step, number)
        layers, states = put((weights.layers, state.layers), (new, moments), number)
        weights = Params(weights.embed, layers, weights.final_norm, weights.head)
        return total, weights, state._replace(layers=states)

    def embed(carry: Any, gradient: Any) -> Any:
        total, weights, state = carry
        new, moments = optimizer.update_group(gradient, state.embed, weights.embed, scale, state.step, 0)
        weights = Params(new, weights.layers, weights.final_norm, weights.head)
        return total + squares(gradient), weights, state._replace(embed=moments)

    return Visitor(lambda carry: carry[1].layers, output, layer, embed)


def _sum_visitor(optimizer: ModelOptimizer, trained: Params, first: Any) -> Visitor:
    """The carry is `Sums`. `first`: is this the micro-batch whose gradients make new projectors?"""

    def add(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), old, new)

    def layer(sums: Sums, number: Any, _: Any, gradient: Any) -> Sums:
        state, total = take((sums.states, sums.layers), number)
        state = jax.lax.cond(first, optimizer.layer.refresh, lambda gradient, state: state, gradient, state)
        total = add(total, optimizer.layer.project(gradient, state))
        states, layers = put((sums.states, sums.layers), (state, total), number)
        return sums._replace(states=states, layers=layers)

    return Visitor(
        lambda sums: trained.layers,
        lambda sums, gradient: sums._replace(output=add(sums.output, gradient)),
        layer,
        lambda sums, gradient: sums._replace(embed=add(sums.embed, gradient)),
    )


def _accumulated(
    state: Any, sweep: Any, batches: Any, seeds: Any, optimizer: ModelOptimizer
) -> tuple[Float[Array, ""], Float[Array, ""], Params, ModelState]:
    """Projected gradients of all micro-batches, then the update."""
    trained, moments = state.trained, state.optimizer

    def one(carry: Any, micro: Any) -> tuple[Any, None]:
        loss, sums = carry
        number, batch, row_seeds = micro
        part, sums = sweep(batch, row_seeds, carry=sums, visitor=_sum_visitor(optimizer, trained, number == 0))
        return (loss + part, sums), None

    projected = jax.eval_shape(jax.vmap(optimizer.layer.project), trained.layers, moments.layers)
    zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, jnp.float32))
    start = Sums(zeros(trained.embed), zeros(projected), zeros(output_of(trained)), moments.layers)
    numbers = jnp.arange(batches.tokens.shape[0])
    (loss, sums), _ = jax.lax.scan(one, (jnp.float32(0), start), (numbers, batches, seeds))
    norm = jnp.sqrt(squares((sums.embed, sums.layers, sums.output)))
    scale = optimizer.clip_scale(norm)
    count = moments.step
    embed, embed_state = optimizer.update_group(sums.embed, moments.embed, trained.embed, scale, count, 0)
    output, output_state = optimizer.update_group(sums.output, moments.output, output_of(trained), scale, count, 1)
    layers, layer_states = optimizer.update_layers(
        lambda layer_state, number, weights: (take(sums.layers, number), layer_state),
        moments._replace(layers=sums.states),
        trained.layers,
        scale,
    )
    weights = Params(embed, layers, output.final_norm, output.head)
    return loss, norm, weights, ModelState(count + 1, embed_state, layer_states, output_state)
