"""PiSSA against PEFT: the same first factors, the same function, and both ways of writing it down."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from tests.methods.gradients import assert_same, by_name, loss_and_gradients, moved, peft_gradients, shaken
from tests.methods.peft_oracle import base, peft_loaded
from tests.tiny import assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora.methods.lora import LoRAProjection
from jora.methods.method import Adapter, State
from jora.methods.pissa import PiSSA, PiSSAProjection, save_residual
from jora.methods.storage import load_adapter, save_adapter
from jora.models.adapted import Dense, Rows, Site
from jora.sharding import single_device

OURS: dict[str, Any] = dict(
    targets=["q_proj", "down_proj", "lm_head"],
    rank=4,
    alpha=6,
    rank_pattern={"down_proj": 2, "layers.1.self_attn.q_proj": 3},
)
THEIRS = dict(target_modules=OURS["targets"], r=4, lora_alpha=6, rank_pattern=OURS["rank_pattern"])


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return PiSSA(**OURS).init(base("llama3"), jax.random.key(0))


@pytest.fixture(scope="module")
def peft() -> PeftModel:
    return get_peft_model(copy.deepcopy(tiny("llama3")[0]), LoraConfig(init_lora_weights="pissa", **THEIRS)).eval()


def products(factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """B A of every module: singular vectors are the same up to signs."""
    return {
        name: factors[name.replace("lora_A", "lora_B")] @ factor for name, factor in factors.items() if "lora_A" in name
    }


def of_peft(model: Any) -> dict[str, np.ndarray]:
    return {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}


def test_the_first_factors_are_pefts(adapter: Adapter, peft: PeftModel) -> None:
    ours = by_name(adapter, adapter.state.trained)
    assert_same(products(ours), products(of_peft(peft)), 3e-5)
    for name, factor in of_peft(peft).items():  # the singular values are shared out alike
        np.testing.assert_allclose(np.abs(ours[name]), np.abs(factor), rtol=0, atol=1e-4)


def test_the_first_step_is_the_base(adapter: Adapter) -> None:
    assert_close(base("llama3")(tokens(), adapter), np.asarray(base("llama3")(tokens())), 1e-5)


def test_a_randomised_decomposition_comes_close(adapter: Adapter) -> None:
    quick = PiSSA(**OURS, init_lora_weights="pissa_niter_300").init(base("llama3"), jax.random.key(0))
    exact, found = (products(by_name(a, a.state.trained)) for a in (adapter, quick))
    assert_same(found, exact, 0.02)  # a random matrix, whose singular values hardly fall, is the hardest
    assert_close(base("llama3")(tokens(), quick), np.asarray(base("llama3")(tokens())), 1e-5)  # however inexact


def test_gradients_equal_peft(adapter: Adapter, peft: PeftModel) -> None:
    """Of a trained adapter on the residual base; PEFT's own factors, so that signs agree."""
    theirs = copy.deepcopy(peft)
    first = {n: a for n, a in of_peft(peft).items()}
    same_start = Adapter(adapter.method, State(adapter.state.trained, adapter.state.constant), adapter.config)
    _, found = loss_and_gradients(base("llama3"), same_start, tokens())
    gradients, expected = by_name(adapter, found), peft_gradients(theirs, tokens())
    ours = by_name(adapter, adapter.state.trained)
    for name, factor in first.items():
        axis = 1 if "lora_A" in name else 0
        signs = np.sign((ours[name] * factor).sum(axis=axis, keepdims=True))
        gradients[name] = gradients[name] * signs
    assert_same(gradients, expected, 1e-3)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_saved_as_a_lora_of_twice_the_rank(adapter: Adapter, changes: dict[str, Any], tmp_path: Path) -> None:
    model = base("llama3")
    if changes:
        adapter = PiSSA(**{**OURS, **changes}).init(model, jax.random.key(0))
    trained = shaken(adapter, keep_zeros=True)
    save_adapter(trained, tmp_path / "a")
    expected = np.asarray(model(tokens(), trained))
    assert np.abs(expected - logits(tiny("llama3")[0], tokens())).max() > 0.1 * expected.std()
    assert_close(logits(peft_loaded("llama3", tmp_path / "a"), tokens()), expected)
    assert_close(model(tokens(), load_adapter(tmp_path / "a", model)), expected)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape[0] == 6


def test_the_file_is_pefts_conversion(adapter: Adapter, peft: PeftModel, tmp_path: Path) -> None:
    """PEFT's `path_initial_model_for_weight_conversion` of the same trained factors."""
    theirs = copy.deepcopy(peft)
    first = tmp_path / "first"
    theirs.peft_config["default"].init_lora_weights = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lm_head's own weight is saved too
        theirs.save_pretrained(str(first))
        theirs.peft_config["default"].init_lora_weights = "pissa"
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(1.25)  # sign by sign the same change as ours
        theirs.save_pretrained(str(tmp_path / "peft"), path_initial_model_for_weight_conversion=str(first))
    trained = jax.tree.map(lambda x: 1.25 * x, adapter.state.trained)
    save_adapter(Adapter(adapter.method, State(trained, adapter.state.constant), adapter.config), tmp_path / "ours")
    read = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft")]
    ours, converted = (products({n: a for n, a in f.items() if "lora_" in n}) for f in read)
    assert_same(ours, converted, 1e-4)
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "peft")]
    for option in ("r", "lora_alpha", "rank_pattern", "use_rslora"):
        assert configs[0][option] == configs[1][option]


def test_the_residual_base_with_a_rank_r_adapter(adapter: Adapter, tmp_path: Path) -> None:
    trained = shaken(adapter, keep_zeros=True)
    save_residual(base("llama3"), trained, tmp_path / "base", tmp_path / "adapter")
    residual = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"), attn_implementation="eager").eval().float()
    expected = np.asarray(base("llama3")(tokens(), trained))
    assert np.abs(logits(residual, tokens()) - expected).max() > 0.1 * expected.std()
    peft = PeftModel.from_pretrained(residual, str(tmp_path / "adapter")).eval()
    assert_close(logits(peft, tokens()), expected)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 48)
    ours = jora.load_model(tmp_path / "base")
    assert_close(ours(tokens(), load_adapter(tmp_path / "adapter", ours)), expected)  # and says it is of this base
    with pytest.raises(jora.InputError, match="lora has no residual"):
        save_residual(ours, load_adapter(tmp_path / "adapter", ours), tmp_path / "b", tmp_path / "c")


def test_dropout_is_of_the_adapter_alone() -> None:
    """With every input of the adapter dropped the constant product still stands for the base: x (W - s A0 B0)."""
    draw = np.random.default_rng(0)
    x, w, a, b = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((2, 5, 8), (8, 6), (8, 2), (2, 6)))
    projection = PiSSAProjection(LoRAProjection(a, b, jnp.float32(0.5), 0.999999), {"a": a, "b": b})
    dense, rows = Dense(w, None, (None,), (None,), single_device()), Rows(dropout=jnp.array([3, 4], jnp.uint32))
    found = projection.apply(x, dense, Site("q_proj", jnp.int32(0)), rows)
    np.testing.assert_allclose(found, x @ (w - 0.5 * a @ b), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_meshes_equal_one_device(adapter: Adapter) -> None:
    sharded = base("llama3", "fsdp=2,tensor=2")
    there = PiSSA(**OURS).init(sharded, jax.random.key(0))
    assert_same(products(by_name(there, there.state.trained)), products(by_name(adapter, adapter.state.trained)), 3e-5)
    trained = shaken(adapter, keep_zeros=True)
    expected = np.asarray(base("llama3")(tokens(), trained))
    assert_close(sharded(tokens(), moved(trained, sharded)), expected, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(targets=["embed_tokens"]), "embed_tokens cannot be adapted"),
        (dict(rank=33, targets=["q_proj"]), "rank 33 is above q_proj, which is 32 x 32"),
        (dict(init_lora_weights="pissa_niter_"), "use pissa, or pissa_niter_16"),
        (dict(alpha=-1.0), "alpha must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(jora.InputError, match=message):
        PiSSA(**options).init(base("llama3"), jax.random.key(0))


def test_a_quantised_base_is_refused() -> None:
    with pytest.raises(jora.InputError, match="pissa needs the base's dense weights"):
        PiSSA().init(jora.load_model(tiny("llama3")[1], quant="int8"), jax.random.key(0))
