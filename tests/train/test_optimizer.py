"""The optimiser against torch: AdamW, transformers' schedules and torch's clipping, over a whole run."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from jora.train.optimizer import learning_rate, make_optimizer
from jora.train.options import TrainOptions

STEPS = 20
SCHEDULES: dict[str, Any] = {
    "cosine": lambda o, w: get_cosine_schedule_with_warmup(o, w, STEPS),
    "linear": lambda o, w: get_linear_schedule_with_warmup(o, w, STEPS),
    "constant": lambda o, w: get_constant_schedule_with_warmup(o, w),
}


def gradient(step: int) -> np.ndarray:
    # Large and small by turns, so that some are clipped and some are not.
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32) * (10.0 if step % 2 else 0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trajectory_equals_torch(schedule: Any) -> None:
    options = TrainOptions(
        schedule=schedule, warmup=0.21, learning_rate=0.05, weight_decay=0.1, beta1=0.8, beta2=0.95, max_grad_norm=1.0
    )
    start = np.random.default_rng(100).normal(size=(4, 3))
    # The reference in float64: what is left is our own rounding.
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    adamw = torch.optim.AdamW([theirs], lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    scheduler = SCHEDULES[schedule](adamw, 5)  # 0.21 x 20 rounded up
    ours = jnp.asarray(start, jnp.float32)
    optimizer = make_optimizer(options, STEPS)
    state = optimizer.init(ours)
    for step in range(STEPS):
        assert learning_rate(step, options, STEPS) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        theirs.grad = torch.from_numpy(gradient(step)).double()
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adamw.step()
        scheduler.step()
        updates, state = optimizer.update(jnp.asarray(gradient(step)), state, ours)
        ours = optax.apply_updates(ours, updates)
        difference = np.abs(np.asarray(ours) - theirs.detach().numpy()).max()
        assert difference <= 1e-6 * np.abs(start).max(), f"step {step}"


def test_without_clipping_large_gradients_count() -> None:
    gradients, start = jnp.full((2,), 100.0), jnp.zeros((2,))
    clipped = make_optimizer(TrainOptions(warmup=0.0, epsilon=1.0), 10)
    free = make_optimizer(TrainOptions(warmup=0.0, epsilon=1.0, max_grad_norm=0.0), 10)
    moved = [float(jnp.abs(o.update(gradients, o.init(start), start)[0]).max()) for o in (clipped, free)]
    assert moved[0] < 0.5 * moved[1]


def test_equal_options_share_one_optimizer() -> None:
    # It is a static argument of the train step: another object would compile everything again.
    assert make_optimizer(TrainOptions(seed=1, epochs=2), 7) is make_optimizer(TrainOptions(seed=2, epochs=3), 7)
    assert make_optimizer(TrainOptions(), 7) is not make_optimizer(TrainOptions(), 8)
