"""LoRA+ against `peft.optimizers.create_loraplus_optimizer`, and through a whole run."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tests.methods.gradients import assert_same, by_name
from tests.methods.peft_oracle import base
from tests.tiny import VOCAB, tiny

import jora
from jora import DoRA, LoRA
from jora.data.batches import Tokenised
from jora.train.optimizer import make_optimizer
from jora.train.options import TrainOptions

STEPS, RATIO = 20, 16.0
OPTIONS = TrainOptions(learning_rate=0.01, schedule="constant", warmup=0.0, weight_decay=0.1, max_grad_norm=0.0)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_trajectory_equals_peft(method: Any) -> None:
    """Twenty AdamW steps with decay, with the same made-up gradients; DoRA's magnitudes learn as B does."""
    model = base("llama3")
    options: dict[str, Any] = dict(rank=3, targets=["q_proj", "down_proj"])
    adapter = method(**options, loraplus_lr_ratio=RATIO).init(model, jax.random.key(0))
    config = LoraConfig(r=3, target_modules=options["targets"], use_dora=method is DoRA)
    peft = get_peft_model(copy.deepcopy(tiny("llama3")[0]), config)
    theirs = {
        n.replace(".default", "").replace("vector.weight", "vector"): p
        for n, p in peft.named_parameters()
        if "lora_" in n
    }
    for name, value in by_name(adapter, adapter.state.trained).items():
        theirs[name].data.copy_(torch.from_numpy(value.copy()))
    reference = create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1
    )
    ours = adapter.state.trained
    optimizer = make_optimizer(OPTIONS, STEPS, adapter.method.rates(ours))
    state = optimizer.init(ours)
    for step in range(STEPS):
        draw = np.random.default_rng(step)
        gradients = jax.tree.map(lambda x, d=draw: jnp.asarray(d.standard_normal(x.shape), jnp.float32), ours)
        for name, value in by_name(adapter, gradients).items():
            theirs[name].grad = torch.from_numpy(value.copy())
        reference.step()
        updates, state = optimizer.update(gradients, state, ours)
        ours = optax.apply_updates(ours, updates)
    assert_same(by_name(adapter, ours), {n: p.detach().numpy() for n, p in theirs.items()}, 1e-5)


def test_only_b_learns_faster() -> None:
    trained = {"q_proj": {"a": 0, "b": 0, "magnitude": 0}, "embed_tokens": {"a": 0, "b": 0}}
    assert LoRA(loraplus_lr_ratio=4).rates(trained) == {
        "q_proj": {"a": 1.0, "b": 4, "magnitude": 4},
        "embed_tokens": {"a": 1.0, "b": 1.0},
    }
    assert LoRA().rates(trained) is None


def test_equal_rates_share_one_optimizer() -> None:
    rates = [{"q": {"a": 1.0, "b": ratio}} for ratio in (4.0, 4.0, 8.0)]
    first, again, other = (make_optimizer(OPTIONS, 7, r) for r in rates)
    assert first is again
    assert first is not other
    assert make_optimizer(OPTIONS, 7) is make_optimizer(OPTIONS, 7, None)


@pytest.mark.slow
def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """From the checkpoint of step three, bit for bit; and another ratio is another run."""
    draw = np.random.default_rng(0)
    data = [Tokenised(draw.integers(3, VOCAB, 16).astype(np.int32), np.arange(16) > 10) for _ in range(8)]
    method = LoRA(rank=2, targets=["q_proj"], loraplus_lr_ratio=RATIO)
    options = TrainOptions(max_steps=6, batch_size=4, max_length=16, remat="none", learning_rate=0.01, save_every=3)
    model = base("llama3")

    def run(out: str, method: LoRA = method, **changes: Any) -> Any:
        return jora.train(model, method, data, out=tmp_path / out, options=dataclasses.replace(options, **changes))

    whole = run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-00000006")
    resumed = run("half", resume=True)
    for mine, again in zip(jax.tree.leaves(whole.adapter.state), jax.tree.leaves(resumed.adapter.state), strict=True):
        np.testing.assert_array_equal(mine, again)
    plain = run("plain", method=dataclasses.replace(method, loraplus_lr_ratio=1.0))
    moved = [np.abs(np.asarray(r.adapter.state.trained["q_proj"]["b"])).max() for r in (whole, plain)]
    assert moved[0] > 8 * moved[1]
    with pytest.raises(jora.InputError, match="loraplus_lr_ratio"):
        run("half", method=dataclasses.replace(method, loraplus_lr_ratio=2.0), resume=True)


def test_a_ratio_below_zero_is_refused() -> None:
    with pytest.raises(jora.InputError, match="loraplus_lr_ratio must be above 0"):
        LoRA(loraplus_lr_ratio=0)
