"""The optimiser against torch: AdamW, transformers' schedules and torch's clipping, over a whole run."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
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

from jora.methods.full import Full
from jora.models.families import config_from_hf
from jora.models.params import abstract_params
from jora.optim import projection
from jora.optim.model import ModelOptimizer
from jora.optim.stacked import init_stacked
from jora.sharding import single_device
from jora.train.optimizer import learning_rate, make_optimizer, optimizer_for
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


CONFIG = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 24,
    }
)


@pytest.mark.parametrize("stagger", [True, False])
def test_galore_spreads_the_refreshes_of_all_matrices(stagger: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step 0 no step renews more than its share of the 21 matrices, and T steps renew each once."""
    # Which are due is the question: a decomposition would only take time to compile.
    monkeypatch.setattr(projection, "leading_vectors", lambda matrix, rank, *_: matrix[:, :rank])
    every, matrices = 4, 21
    options = TrainOptions(
        optimizer="galore", galore_rank=2, galore_refresh=every, galore_svd="exact", galore_stagger=stagger
    )
    shapes = abstract_params(CONFIG, single_device(), jnp.float32)
    optimizer = optimizer_for(Full(), options, 10, CONFIG, single_device(), shapes)
    assert isinstance(optimizer, ModelOptimizer)
    draw, refreshed = np.random.default_rng(0), jax.jit(jax.vmap(optimizer.layer.refresh))

    def drawn() -> Any:
        return jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), shapes.layers)

    state, renewed = jax.jit(partial(init_stacked, optimizer.layer))(drawn()), []
    for _ in range(2 * every + 1):
        before = state.projectors
        state = refreshed(drawn(), state)
        pairs = zip(before.values(), state.projectors.values(), strict=True)
        renewed.append(sum(int(np.any(old != new, axis=(1, 2)).sum()) for old, new in flattened(pairs)))
        state = state._replace(step=state.step + 1)
    assert renewed[0] == matrices
    if stagger:
        assert max(renewed[1:]) <= -(-matrices // every)
        assert sum(renewed[1 : every + 1]) == sum(renewed[every + 1 :]) == matrices
    else:
        assert renewed[1:] == [0, 0, 0, matrices] * 2


def flattened(pairs: Any) -> Any:
    """Projectors of all layers as [layers, side, rank]."""
    for pair in pairs:
        yield tuple(np.asarray(p, np.float32).reshape(p.shape[0], -1, p.shape[-1]) for p in pair)
