"""AdamW with warm-up, a schedule and clipping: the trajectory of torch and transformers, step for step."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jora.train.options import TrainOptions

# torch.nn.utils.clip_grad_norm_ adds this to the norm that it divides by.
CLIP_EPSILON = 1e-6


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """Steps of rising rate: `warmup` x all steps, rounded up as transformers does."""
    return math.ceil(options.warmup * total_steps)


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


def clip_by_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down together to a global L2 norm of at most `max_norm`, as torch does."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
        scale = jnp.minimum(1.0, max_norm / (norm + CLIP_EPSILON))
        return jax.tree.map(lambda g: g * scale, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make_optimizer(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW (arXiv 1711.05101) on everything that trains, then the schedule.

    Equal arguments give the same object: it is a static argument of the train step, which must not be
    compiled again for an equal run.
    """
    names = ("learning_rate", "schedule", "warmup", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm")
    return _make(TrainOptions(**{name: getattr(options, name) for name in names}), total_steps)


@lru_cache(maxsize=32)
def _make(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
    def schedule(count: Any) -> Float[Array, ""]:
        return learning_rate(count, options, total_steps, jnp)

    adamw = optax.adamw(
        schedule, b1=options.beta1, b2=options.beta2, eps=options.epsilon, weight_decay=options.weight_decay
    )
    return optax.chain(clip_by_norm(options.max_grad_norm), adamw) if options.max_grad_norm else adamw
