"""One step of all jobs: one forward and one backward pass, then each job's own update.

What differs between jobs is data (`Settings`), so that one program serves them whatever their rates, decays,
norms, seeds and step counts. A job's loss is the mean over its own answer tokens; the sum of these is what is
differentiated, and a job's factors meet its own rows only. So each job's gradient is that of training it alone.

A job whose loss or gradient is not finite keeps its last state from then on (`alive`); rows do not mix, so the
others never see it.

Shape legend: m micro-batches, b rows, n answer positions a row, j jobs of a kind.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jora.kernels import gpu_compiler
from jora.kernels.counter_hash import fold_all
from jora.methods.bank import Bank, Kind, job_axes
from jora.models.config import ModelConfig
from jora.models.decoder import Remat
from jora.models.params import Params
from jora.optim.model import CLIP_EPSILON
from jora.sharding import Layout
from jora.train.step import MicroBatches, Program, batch_loss


class KindState(NamedTuple):
    """What a step changes of the jobs of one kind; leaves of `trained` and `optimizer` have a job axis."""

    trained: Any
    optimizer: Any
    step: Int[Array, " j"]  # finished optimiser steps
    alive: Bool[Array, " j"]  # false from the first loss on that was not finite


class Settings(NamedTuple):
    """What a step is told about each job of one kind.

    rest1, rest2: 1 - beta1 and 1 - beta2, subtracted in double precision as optax has them: in fp32 1 - 0.999 is off by
    1e-5.
    """

    active: Bool[Any, " j"]  # has rows in this batch
    seed: UInt32[Any, " j"]
    learning_rate: Float[Any, " j"]
    beta1: Float[Any, " j"]
    beta2: Float[Any, " j"]
    rest1: Float[Any, " j"]
    rest2: Float[Any, " j"]
    epsilon: Float[Any, " j"]
    weight_decay: Float[Any, " j"]
    max_grad_norm: Float[Any, " j"]  # infinity: no clipping


class Measured(NamedTuple):
    """What a step says about each job of one kind. `ok`: loss and gradient were finite, now and before."""

    loss: Float[Array, " j"]
    grad_norm: Float[Array, " j"]
    ok: Bool[Array, " j"]


NO_UPDATE = optax.identity()  # where a `Program` is made for its loss alone


class BankProgram(NamedTuple):
    """The static part of a step."""

    config: ModelConfig
    layout: Layout
    bank: Bank
    remat: Remat
    placement: tuple[Any, ...] | None = None  # shardings of the states' leaves, which a step must not change

    @property
    def single(self) -> Program:
        """As `train.step.batch_loss` takes it; the update is this module's."""
        return Program(self.config, self.layout, self.bank, NO_UPDATE, self.remat)


class Moments(NamedTuple):
    """AdamW's state; leaves like those of `trained`. The step count is `KindState.step`."""

    mu: Any
    nu: Any


def first_moments(trained: Any) -> Moments:
    """Before the first step."""
    return Moments(*(jax.tree.map(jnp.zeros_like, trained) for _ in range(2)))


@partial(jax.jit, static_argnames="program", donate_argnames="states", compiler_options=gpu_compiler.OPTIONS)
def bank_step(
    states: tuple[KindState, ...],
    constants: tuple[Any, ...],
    params: Params,
    batches: MicroBatches,
    settings: tuple[Settings, ...],
    *,
    program: BankProgram,
) -> tuple[tuple[KindState, ...], tuple[Measured, ...]]:
    """One update of every active job. `states` are donated."""
    spans = program.bank.spans
    jobs = spans.jobs()
    seeds, steps = jnp.concatenate([s.seed for s in settings]), jnp.concatenate([s.step for s in states])
    seeds = fold_all(seeds[jobs], steps[jobs], batches.row_ids)
    losses, gradients = _gradients(states, constants, params, batches, seeds, jobs, program)
    cuts = np.cumsum([kind.jobs for kind in program.bank.kinds])[:-1]
    updated = [
        _update(kind, *each)
        for kind, *each in zip(program.bank.kinds, states, gradients, jnp.split(losses, cuts), settings, strict=True)
    ]
    new, measured = tuple(state for state, _ in updated), tuple(found for _, found in updated)
    if program.placement is not None:
        leaves, structure = jax.tree.flatten(new)
        new = jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, program.placement))
    return new, measured


def _gradients(
    states: tuple[KindState, ...],
    constants: tuple[Any, ...],
    params: Params,
    batches: MicroBatches,
    seeds: Array,
    jobs: np.ndarray,
    program: BankProgram,
) -> tuple[Float[Array, " jobs"], Any]:
    """Each job's mean loss per answer token over all micro-batches, and the gradient of their sum."""
    count = sum(kind.jobs for kind in program.bank.kinds)
    totals = _per_job(jnp.sum(batches.answers.weights, axis=(0, 2)), jobs, count)
    share = 1 / jnp.maximum(totals, 1e-9)
    weights = batches.answers.weights * share[jobs][:, None]
    batches = batches._replace(answers=batches.answers._replace(weights=weights))
    trained = tuple(state.trained for state in states)

    def one(batch: MicroBatches, row_seeds: Any) -> tuple[Array, Any]:
        def loss(trained: Any) -> Any:
            return batch_loss(trained, constants, params, batch, row_seeds, program.single)

        (_, nll), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        # Answers of weight 0 stand for nothing, whatever their loss.
        weighted = jnp.where(batch.answers.weights > 0, nll * batch.answers.weights, 0.0)
        return _per_job(jnp.sum(weighted, axis=-1), jobs, count), gradients

    if batches.tokens.shape[0] == 1:
        return one(*jax.tree.map(lambda x: x[0], (batches, seeds)))

    def accumulate(carry: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, one(*micro)), None

    zero = (jnp.zeros(count, jnp.float32), jax.tree.map(jnp.zeros_like, trained))
    return jax.lax.scan(accumulate, zero, (batches, seeds))[0]


def _per_job(of_rows: Float[Array, " b"], jobs: np.ndarray, count: int) -> Float[Array, " jobs"]:
    """Sums over the rows of each job; what is not finite stays in its own job's sum."""
    return jnp.sum(jnp.where(jobs == np.arange(count)[:, None], of_rows, 0.0), axis=-1)


def _update(
    kind: Kind, state: KindState, gradients: Any, losses: Float[Array, " j"], settings: Settings
) -> tuple[KindState, Measured]:
    """Clipping and AdamW, job by job."""
    axes = job_axes(state.trained)
    norms = jax.vmap(optax.tree.norm, in_axes=(axes,))(gradients)
    ok = state.alive & (~settings.active | (jnp.isfinite(losses) & jnp.isfinite(norms)))
    moves = ok & settings.active
    moments = Moments(axes, axes)
    trained, optimizer = jax.vmap(
        partial(_adamw, kind), in_axes=(axes, moments, axes, 0, 0, 0, 0), out_axes=(axes, moments)
    )(state.trained, state.optimizer, gradients, settings, norms, state.step + 1, moves)
    return KindState(trained, optimizer, state.step + moves, ok), Measured(losses, norms, ok)


def _adamw(
    kind: Kind, trained: Any, moments: Moments, gradients: Any, s: Settings, norm: Array, count: Array, moves: Array
) -> tuple[Any, Moments]:
    """One job's step number `count` (from 1), as `train.optimizer.make_optimizer` makes it; none unless `moves`.

    A parameter is moved by the *kept* moments: made from the old ones, the compiler would hold these twice.
    """
    clip = jnp.minimum(1.0, s.max_grad_norm / (norm + CLIP_EPSILON))
    rates = kind.method.rates(trained)

    def kept(new: Array, old: Array) -> Array:
        return jnp.where(moves, new, old)

    mu = jax.tree.map(lambda g, m: kept(s.rest1 * (g * clip) + s.beta1 * m, m), gradients, moments.mu)
    nu = jax.tree.map(lambda g, v: kept(s.rest2 * jnp.square(g * clip) + s.beta2 * v, v), gradients, moments.nu)
    mu_share, nu_share = 1 - s.beta1**count, 1 - s.beta2**count

    def moved(p: Array, m: Array, v: Array, rate: float) -> Array:
        direction = (m / mu_share) / (jnp.sqrt(v / nu_share) + s.epsilon) + s.weight_decay * p
        return kept(p - rate * s.learning_rate * direction, p)

    rates = jax.tree.map(lambda _: 1.0, trained) if rates is None else rates
    return jax.tree.map(moved, trained, mu, nu, rates), Moments(mu, nu)
