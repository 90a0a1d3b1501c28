"""First values of LoRA's factors against PEFT's: the same distribution, zeros where PEFT has them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.gradients import by_name
from tests.methods.peft_oracle import base, peft_loaded
from tests.tiny import assert_close, logits, tiny, tokens

import jora
from jora import LoRA
from jora.methods.storage import load_adapter, save_adapter

TARGETS = ["q_proj", "down_proj"]
RANKS = {"down_proj": 8}
DRAWS = 24


def ours(init: Any, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    made = LoRA(rank=4, targets=TARGETS, rank_pattern=RANKS, init_lora_weights=init, **options)
    adapter = made.init(base("llama3"), jax.random.key(seed))
    return by_name(adapter, adapter.state.trained)


def theirs(init: Any, seed: int) -> dict[str, np.ndarray]:
    config = LoraConfig(r=4, target_modules=TARGETS, rank_pattern=RANKS, init_lora_weights=init)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(tiny("llama3")[0]), config)
    return {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}


def pooled(draws: list[dict[str, np.ndarray]], target: str, part: str) -> np.ndarray:
    """All elements of a target's factor, over layers and draws."""
    return np.concatenate([a.ravel() for draw in draws for n, a in draw.items() if target in n and f"lora_{part}" in n])


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_drawn_as_peft_draws(init: Any) -> None:
    """Size and shape of the distribution, over many draws; B = 0 but for orthogonal."""
    found, expected = [ours(init, seed) for seed in range(DRAWS)], [theirs(init, seed) for seed in range(DRAWS)]
    assert {n: a.shape for n, a in found[0].items()} == {n: a.shape for n, a in expected[0].items()}
    quantiles = [0.25, 0.5, 0.75, 0.95]
    for target in TARGETS:
        for part in "AB":
            mine, peft = pooled(found, target, part), pooled(expected, target, part)
            # orthogonal draws few numbers and repeats them in every row: one standard deviation here is 1 %.
            assert mine.std() == pytest.approx(peft.std(), rel=0.05)
            np.testing.assert_allclose(
                np.quantile(np.abs(mine), quantiles), np.quantile(np.abs(peft), quantiles), rtol=0.1
            )


def test_orthogonal_factors_cancel() -> None:
    found = ours("orthogonal")
    for name, a in found.items():
        if "lora_A" in name:
            b = found[name.replace("lora_A", "lora_B")]
            assert np.abs(a).max() > 0.01
            assert np.abs(b @ a).max() < 1e-7
    model = base("llama3")
    adapter = LoRA(rank=4, targets=TARGETS, init_lora_weights="orthogonal").init(model, jax.random.key(0))
    assert_close(model(tokens(), adapter), np.asarray(model(tokens())), 1e-5)


def test_layers_draw_their_own() -> None:
    for init in (True, "gaussian", "orthogonal"):
        found = ours(init)
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
        assert not np.array_equal(found[name.format(0)], found[name.format(1)])


def test_what_was_drawn_is_stored(tmp_path: Path) -> None:
    model = base("llama3")
    made = LoRA(rank=4, targets=TARGETS, init_lora_weights="orthogonal").init(model, jax.random.key(0))
    save_adapter(made, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", model)
    for mine, again in zip(jax.tree.leaves(made.state), jax.tree.leaves(loaded.state), strict=True):
        np.testing.assert_array_equal(mine, again)
    assert_close(logits(peft_loaded("llama3", tmp_path / "a"), tokens()), np.asarray(model(tokens(), made)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=3, init_lora_weights="orthogonal"), "even ranks, found 3"),
        (dict(init_lora_weights="olora"), "'olora' is not known"),
        (dict(init_lora_weights="pissa"), "choose pissa"),
        (dict(init_lora_weights=False), "False is not known"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(jora.InputError, match=message):
        LoRA(**options)
    with pytest.raises(jora.InputError, match="orthogonal does not apply to embed_tokens"):
        LoRA(init_lora_weights="orthogonal", targets=["embed_tokens"]).init(base("llama3"), jax.random.key(0))
