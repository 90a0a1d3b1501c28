"""One optimiser step: loss and gradients of what trains, accumulated over micro-batches, and the update.

The loss is normalised once, over all answer tokens of the whole step: unequal numbers of answer tokens in
the micro-batches, or padding rows, change nothing.

Shape legend: m micro-batches, b rows, s tokens a row, n answer positions a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jora.kernels import gpu_compiler
from jora.kernels.counter_hash import fold_all
from jora.methods.method import State
from jora.models import decoder
from jora.models.adapted import Rows
from jora.models.config import ModelConfig
from jora.models.decoder import Remat
from jora.models.head import Answers, answer_loss
from jora.models.params import Params
from jora.optim.model import ModelOptimizer
from jora.sharding import Layout


class TrainState(NamedTuple):
    """What a step changes. `step` counts finished optimiser steps."""

    trained: Any
    optimizer: Any
    step: Int[Array, ""]


class MicroBatches(NamedTuple):
    """The batches of one step, stacked. `segments` is None where each row is one example, padded on the right."""

    tokens: Int[Array, "m b s"]
    positions: Int[Array, "m b s"]
    segments: Int[Array, "m b s"] | None
    answers: Answers  # leaves [m, b, n]
    row_ids: Int[Array, "m b"]  # a row's number in the step's global batch: keys dropout
    instance: Float[Array, "m b h"] | None = None  # a vector of each row's prompt, for methods that ask for one


class Program(NamedTuple):
    """The static part of a step; hashable, so that equal programs share one compilation."""

    config: ModelConfig
    layout: Layout
    method: Any
    optimizer: optax.GradientTransformation | ModelOptimizer
    remat: Remat
    placement: tuple[Any, ...] | None = None  # shardings of the state's leaves, which a step must not change


def batch_loss(
    trained: Any,
    constant: Any,
    params: Params,
    batch: MicroBatches,
    dropout: Any,
    program: Program,
) -> tuple[Float[Array, ""], Float[Array, "b n"]]:
    """(sum of weight * nll, nll of every answer position) of one micro-batch (leaves without m)."""
    config, layout = program.config, program.layout
    rows = Rows(dropout, instance=batch.instance)
    params = program.method.base(State(trained, constant), params)
    bound = program.method.bind(State(trained, constant), rows)
    hidden, _ = decoder.forward(
        params,
        config,
        layout,
        layout.constrain(batch.tokens, "batch", None),
        batch.positions,
        batch.segments,
        bound=bound,
        rows=rows,
        remat=program.remat,
    )
    return answer_loss(params, config, layout, hidden, batch.answers, bound, rows)


def gradients(
    trained: Any,
    constant: Any,
    params: Params,
    batches: MicroBatches,
    seeds: Any,
    program: Program,
) -> tuple[Float[Array, ""], Any]:
    """Mean loss per answer token over all micro-batches, and its gradient with respect to `trained`.

    seeds: uint32 [m, b] row seeds for dropout, or None.
    """
    total = jnp.maximum(jnp.sum(batches.answers.weights), 1e-9)

    def one(batch: MicroBatches, row_seeds: Any) -> tuple[Array, Any]:
        def mean_loss(trained: Any) -> Array:
            loss, _ = batch_loss(trained, constant, params, batch, row_seeds, program)
            return loss / total

        return jax.value_and_grad(mean_loss)(trained)

    if batches.tokens.shape[0] == 1:
        return one(*jax.tree.map(lambda x: x[0], (batches, seeds)))

    def accumulate(carry: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(*micro)), None

    # Sums are fp32, also those of the gradients of 16-bit weights.
    zero = (jnp.float32(0), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained))
    return jax.lax.scan(accumulate, zero, (batches, seeds))[0]


@partial(jax.jit, static_argnames="program", donate_argnames="state", compiler_options=gpu_compiler.OPTIONS)
def train_step(
    state: TrainState,
    constant: Any,
    params: Params,
    batches: MicroBatches,
    seed: Any,
    *,
    program: Program,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update. `state` is donated. Returns the new state and {"loss", "grad_norm"} (fp32 scalars)."""
    seeds = fold_all(seed, state.step, batches.row_ids)
    optimizer = program.optimizer
    if isinstance(optimizer, ModelOptimizer) and optimizer.layerwise:
        from jora.train.layerwise import layerwise_update

        loss, norm, trained, moments = layerwise_update(state, params, batches, seeds, program)
    else:
        loss, grads = gradients(state.trained, constant, params, batches, seeds, program)
        if isinstance(optimizer, ModelOptimizer):
            trained, moments, norm = optimizer.step(grads, state.optimizer, state.trained)
        else:
            updates, moments = optimizer.update(grads, state.optimizer, state.trained)
            trained, norm = optax.apply_updates(state.trained, updates), optax.tree.norm(grads)
    new = TrainState(trained, moments, state.step + 1)
    if program.placement is not None:
        structure: Any
        leaves, structure = jax.tree.flatten(new)
        held = map(jax.lax.with_sharding_constraint, leaves, program.placement)
        new = structure.unflatten(list(held))
    return new, {"loss": loss, "grad_norm": norm}


@partial(jax.jit, static_argnames="program", compiler_options=gpu_compiler.OPTIONS)
def eval_step(
    trained: Any, constant: Any, params: Params, batch: MicroBatches, *, program: Program
) -> tuple[Float[Array, ""], Float[Array, "b n"]]:
    """(sum of weight * nll, nll per answer position) of one batch (leaves without m), without dropout."""
    return batch_loss(trained, constant, params, batch, None, program)
