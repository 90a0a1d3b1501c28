"""Full fine-tuning against transformers and torch, and with it GaLore and 8-bit Adam through the whole trainer."""

from __future__ import annotations

import copy
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from galore_torch import GaLoreAdamW
from tests.optim.test_galore import fixed_signs as fixed_signs  # a fixture
from tests.tiny import tiny
from tests.train.conftest import Reporter, examples, losses
from transformers import AutoModelForCausalLM

import jora
from jora.errors import InputError
from jora.methods.full import Full
from jora.methods.lora import LoRA
from jora.models.model import Model, load_model
from jora.train import TrainOptions, train

OPTIONS = TrainOptions(max_steps=3, batch_size=4, max_length=24, remat="none", learning_rate=0.01, warmup=0.0)


def fresh(family: str = "llama2") -> Model:
    """Training changes the model that it is given."""
    return load_model(tiny(family)[1], dtype="float32")


def options(**changes: Any) -> TrainOptions:
    return dataclasses.replace(OPTIONS, **changes)


def leaves(tree: Any) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in found}


def assert_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    ours, theirs = leaves(a), leaves(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", ["llama2", "gemma3"])
def test_it_trains_as_torch_does(family: str, tmp_path: Path) -> None:
    data = examples(8)
    overrides: dict[str, Any] = dict(num_hidden_layers=2) if family == "gemma3" else {}
    if overrides:
        overrides["layer_types"] = ["sliding_attention", "full_attention"]
    reference, directory = tiny(family, **overrides)
    theirs = copy.deepcopy(reference).train()
    model = load_model(directory, dtype="float32")
    # A large epsilon: an element whose gradient is all rounding would else move by the rate either way.
    chosen = options(batch_size=8, schedule="constant", weight_decay=0.1, max_grad_norm=0.5, epsilon=1e-4)
    result = train(model, Full(), data, out=tmp_path / "run", options=chosen)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, eps=1e-4)
    expected = [torch_step(theirs, data, optimizer, 0.5) for _ in range(3)]
    np.testing.assert_allclose(losses(result), expected, rtol=1e-4)
    # The result is a model directory for transformers, and the model itself.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    original = reference.state_dict()
    for name, value in theirs.state_dict().items():
        moved = (value - original[name]).abs().max().item()
        np.testing.assert_allclose(saved[name], value, rtol=0, atol=0.01 * moved, err_msg=name)
        assert moved > 0.005, name
    assert model.path == str(tmp_path / "run" / "model")
    assert_equal(model.params, load_model(tmp_path / "run" / "model", dtype="float32").params)
    assert model.identity["fingerprint"] == load_model(model.path).identity["fingerprint"]


def torch_step(model: Any, data: Any, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """One update from all of the data; the loss before it."""
    total = sum(int(e.loss.sum()) for e in data)
    loss = torch.zeros(())
    for example in data:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))[None]
        logits = model(tokens).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        loss = loss + (nll * torch.from_numpy(example.loss[1:].astype(np.float32))).sum() / total
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return float(loss.item())


def test_galore_trains_as_galore_torch_does(fixed_signs: None, tmp_path: Path) -> None:
    """Matrices of the layers projected and renewed every second step, all else at full rank, decay decoupled."""
    data, steps, rate, decay, epsilon = examples(8), 5, 0.02, 0.1, 1e-4
    reference, directory = tiny("llama2")
    theirs = copy.deepcopy(reference).train()
    chosen = options(
        max_steps=steps,
        batch_size=8,
        schedule="constant",
        learning_rate=rate,
        weight_decay=decay,
        max_grad_norm=0.5,
        epsilon=epsilon,
        optimizer="galore",
        galore_rank=4,
        galore_refresh=2,
        galore_stagger=False,
        galore_svd="exact",
        galore_projection="float32",
    )
    result = train(load_model(directory, dtype="float32"), Full(), data, out=tmp_path / "run", options=chosen)
    matrices = [value for name, value in theirs.named_parameters() if name.endswith("_proj.weight")]
    others = [value for name, value in theirs.named_parameters() if not name.endswith("_proj.weight")]
    assert len(matrices) == 7 * 2
    projected = {"params": matrices, "rank": 4, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": others}, projected]
    optimizer = GaLoreAdamW(groups, lr=rate, weight_decay=decay, no_deprecation_warning=True)
    expected = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # added before V's bias is taken off there, behind it in torch's AdamW
            group["eps"] = epsilon * math.sqrt(1 - 0.999**step)
        expected.append(torch_step(theirs, data, optimizer, 0.5))
    # It decays the weights behind the update, torch's AdamW (and ours) before it: rate x decay = 0.2 % of the update.
    np.testing.assert_allclose(losses(result), expected, rtol=2e-3)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    original = reference.state_dict()
    for name, value in theirs.state_dict().items():
        moved = (value - original[name]).abs().max().item()
        np.testing.assert_allclose(saved[name], value, rtol=0, atol=0.02 * moved, err_msg=name)
        assert moved > 0.01, name


def test_chosen_weights_train_and_others_do_not(tmp_path: Path) -> None:
    model = fresh()
    before = leaves(model.params)
    method = Full(weights=["q_proj", "lm_head", "norms"])
    assert method == Full(weights=("norms", "lm_head", "q_proj"))
    train(model, method, examples(8), out=tmp_path, options=OPTIONS)
    changed = {name for name, value in leaves(model.params).items() if (value != before[name]).any()}
    assert changed == {"layers.weights.q_proj", "head", "final_norm", "layers.norms.input", "layers.norms.mlp"}


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_bits_and_the_model_is_the_best_one(tmp_path: Path) -> None:
    chosen = options(
        max_steps=5,
        eval_every=1,
        learning_rate=0.3,
        optimizer="galore8bit",
        galore_rank=8,
        galore_refresh=4,
        galore_projection="int8",
    )
    data: dict[str, Any] = dict(data=examples(10), eval_data=examples(4, seed=9))
    straight, resumed = fresh(), fresh()
    before = jax.tree.leaves(straight.params)
    whole = train(straight, Full(), out=tmp_path / "a", options=chosen, **data)
    # Weights are not held twice: the model's own were given up, and what is returned are the model's own.
    assert all(leaf.is_deleted() for leaf in before)
    ours, theirs = jax.tree.leaves(whole.adapter.state.trained), jax.tree.leaves(straight.params)
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    reporter = Reporter(lambda step: signal.raise_signal(signal.SIGINT) if step == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, Full(), out=tmp_path / "b", options=chosen, reporter=reporter, **data)
    assert jnp.isfinite(resumed.params.embed).all()  # the model has the weights of the step that was reached
    assert "fingerprint" not in resumed.identity  # and is no longer the model that was loaded
    reporter = Reporter()
    again = dataclasses.replace(chosen, resume=True)
    result = train(resumed, Full(), out=tmp_path / "b", options=again, reporter=reporter, **data)
    assert reporter.notes[0].startswith("resuming after step")
    assert losses(result) == losses(whole)
    assert_equal(straight.params, resumed.params)
    assert result.best_step == whole.best_step is not None and result.best_step < 5
    assert_equal(load_model(tmp_path / "b" / "model", dtype="float32").params, straight.params)


def test_bad_input(tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(InputError, match=r"optimizer is galore: it trains the model's own weights.*use method full"):
        train(model, LoRA(rank=2), examples(4), out=tmp_path / "a", options=options(optimizer="galore"))
    with pytest.raises(InputError, match=r"layerwise is True: .*use method full"):
        train(model, LoRA(rank=2), examples(4), out=tmp_path / "b", options=options(layerwise=True))
    with pytest.raises(InputError, match=r"rank 33 is above the smaller side of weights\.\w+_proj, 32"):
        chosen = options(optimizer="galore", galore_rank=33)
        train(model, Full(), examples(4), out=tmp_path / "c", options=chosen)
    with pytest.raises(InputError, match="optimizer is galore: no linear layer trains"):
        train(model, Full("norms"), examples(4), out=tmp_path / "e", options=options(optimizer="galore"))
    with pytest.raises(InputError, match="layerwise: nothing in the layers trains"):
        train(model, Full("embed_tokens"), examples(4), out=tmp_path / "f", options=options(layerwise=True))
    with pytest.raises(InputError, match="weights 'wq' is not known"):
        Full(weights=["wq"])
    with pytest.raises(InputError, match="lm_head is its embedding table"):
        Full(weights="lm_head").init(fresh("gemma"), jax.random.key(0))
    with pytest.raises(InputError, match="no adapter to merge"):
        jora.merge(model, Full().init(model, jax.random.key(0))).save(tmp_path / "d")
    with pytest.raises(InputError, match="layerwise: with accumulation"):
        options(layerwise=True, accumulation=2, optimizer="galore")
    assert jnp.isfinite(model.params.embed).all()  # what was refused has not consumed the model
