"""AdamW with warm-up, a schedule and clipping: the trajectory of torch and transformers, step for step."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jora.errors import InputError
from jora.methods.method import Method
from jora.models.config import ModelConfig
from jora.optim.adam import Moments, scale_by_adam
from jora.optim.galore import GaLore
from jora.optim.matrices import layer_blocks, layer_matrices, table_blocks
from jora.optim.model import CLIP_EPSILON, Direct, ModelOptimizer
from jora.sharding import Layout
from jora.train.options import TrainOptions


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """Steps of rising rate: `warmup` x all steps, rounded up as transformers does.

    0 where there is one step in all: warm-up begins at a rate of 0, and it would train nothing.
    """
    return math.ceil(options.warmup * total_steps) if total_steps > 1 else 0


def learning_rate(step: Any, options: TrainOptions, total_steps: int, xp: Any = np) -> Any:
    """The rate of step number `step` (from 0): linear warm-up from 0, then the schedule down to 0.

    As `get_cosine_schedule_with_warmup`, `get_linear_schedule_with_warmup` and
    `get_constant_schedule_with_warmup` of transformers. `xp`: numpy, or jax.numpy inside jit.
    """
    warmup = warmup_steps(options, total_steps)
    left = xp.maximum(total_steps - step, 0) / max(1, total_steps - warmup)
    # sin^2(pi/2 left) is HF's (1 + cos(pi (1 - left))) / 2 without cancellation near the end.
    falls = {"cosine": lambda: xp.sin(0.5 * math.pi * left) ** 2, "linear": lambda: left, "constant": lambda: 1.0}
    share = xp.where(step < warmup, step / max(1, warmup), falls[options.schedule]())
    return options.learning_rate * share


def diverged(step: int, seen: str, options: TrainOptions) -> str:
    """One line about numbers that are not finite, `seen` after `step`, and what to do."""
    return f"step {step}: {seen}: lower learning_rate (now {options.learning_rate}) or raise warmup"


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down together to a global L2 norm of at most `max_norm`, as torch does."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        scale = jnp.minimum(1.0, max_norm / (norm + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_updates(rates: Any) -> optax.GradientTransformation:
    """Multiply the updates, leaf for leaf: the same as learning rates (and decays) that many times as large."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda rate, u: u if rate == 1.0 else rate * u, rates, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(options: TrainOptions, total_steps: int, rates: Any = None) -> optax.GradientTransformation:
    """Clipping, then AdamW (arXiv 1711.05101) on everything that trains, then the schedule.

    rates: `Method.rates`, what the learning rate of each leaf is multiplied by. Equal arguments give the same
    object: it is a static argument of the train step, which must not be compiled again for an equal run.
    """
    leaves, structure = jax.tree.flatten(rates)
    return _make(_numbers(options, _ADAMW), total_steps, tuple(leaves), structure)


def optimizer_for(
    method: Method, options: TrainOptions, total_steps: int, config: ModelConfig, layout: Layout, trained: Any
) -> optax.GradientTransformation | ModelOptimizer:
    """The optimiser of what `method` trains; `trained` may be shapes.

    Raises:
        InputError: GaLore, or updates inside the backward pass, where the model's own weights (or those of its
            layers) are frozen; a rank above a matrix's smaller side.
    """
    galore = options.optimizer.startswith("galore")
    if method.in_place:
        if galore and not trained.layers.weights:
            raise InputError(f"training option optimizer is {options.optimizer}: no linear layer trains; use adamw")
        if options.layerwise and not jax.tree.leaves(trained.layers):
            raise InputError("training option layerwise: nothing in the layers trains; leave it off")
        optimizer = _make_model_optimizer(_numbers(options, _ADAMW + _GALORE), total_steps, config, layout)
        jax.eval_shape(optimizer.init, trained)  # the rank is checked here, before anything is compiled
        return optimizer
    for name, asked in (("optimizer", galore), ("layerwise", options.layerwise)):
        if asked:
            raise InputError(
                f"training option {name} is {getattr(options, name)}: it trains the model's own weights, which "
                f"method {method.name} leaves frozen; use method full"
            )
    return make_optimizer(options, total_steps, method.rates(trained))


TABLE_ELEMENTS = 1 << 23  # of the vocabulary's tables are updated at a time: 32 MiB of each fp32 temporary
_ADAMW = (
    *("learning_rate", "schedule", "warmup", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm"),
    "optimizer",
)
_GALORE = (
    *("galore_rank", "galore_scale", "galore_refresh", "galore_projection", "galore_svd", "galore_stagger"),
    *("layerwise", "clip_projected", "seed", "accumulation"),
)


def _numbers(options: TrainOptions, names: tuple[str, ...]) -> TrainOptions:
    """Those options alone, so that runs that differ in others share an optimiser."""
    return TrainOptions(**{name: getattr(options, name) for name in names})


@lru_cache(maxsize=32)
def _make_model_optimizer(
    options: TrainOptions, total_steps: int, config: ModelConfig, layout: Layout
) -> ModelOptimizer:
    """AdamW or GaLore of the model's own weights, a layer at a time."""
    galore = options.optimizer.startswith("galore")
    moments: Moments = "int8" if options.optimizer.endswith("8bit") else "float32"
    adam = partial(scale_by_adam, options.beta1, options.beta2, options.epsilon, moments=moments)
    inner = adam(keep=layer_blocks(config, options.galore_rank if galore else None))
    layer: GaLore | Direct = Direct(inner)
    if galore:
        layer = GaLore(
            inner,
            rank=options.galore_rank,
            scale=options.galore_scale,
            refresh_every=options.galore_refresh,
            matrices=layer_matrices(config),
            precision=options.galore_projection,
            factorisation=options.galore_svd,
            stagger=options.galore_stagger,
            layers=config.layers,
            mesh=layout.mesh,
            seed=options.seed,
        )
    return ModelOptimizer(
        adam(keep=table_blocks, at_once=TABLE_ELEMENTS),
        layer,
        rate=lambda step: learning_rate(step, options, total_steps, jnp),
        weight_decay=options.weight_decay,
        max_norm=options.max_grad_norm,
        layerwise=options.layerwise,
        clip_projected=options.clip_projected,
    )


@lru_cache(maxsize=32)
def _make(
    options: TrainOptions, total_steps: int, rates: tuple[float, ...], structure: Any
) -> optax.GradientTransformation:
    def schedule(count: Any) -> Float[Array, ""]:
        return learning_rate(count, options, total_steps, jnp)

    adamw = optax.adamw(
        schedule, b1=options.beta1, b2=options.beta2, eps=options.epsilon, weight_decay=options.weight_decay
    )
    if options.optimizer == "adamw8bit":
        adamw = optax.chain(
            scale_by_adam(options.beta1, options.beta2, options.epsilon, moments="int8"),
            optax.add_decayed_weights(options.weight_decay),
            optax.scale_by_learning_rate(schedule),
        )
    parts = [clip_by_norm(options.max_grad_norm)] if options.max_grad_norm else []
    parts.append(adamw)
    if rates:
        parts.append(scale_updates(jax.tree.unflatten(structure, rates)))
    return optax.chain(*parts) if len(parts) > 1 else adamw
