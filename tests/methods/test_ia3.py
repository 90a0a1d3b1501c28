"""IA3 against PEFT: both directions, merging, one step of training, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peft import IA3Config
from tests.methods.gradients import shaken
from tests.methods.peft_configs import assert_both_ways, assert_gradients, edit, loaded, made
from tests.methods.peft_oracle import base
from tests.tiny import assert_close, logits, tokens
from transformers import AutoModelForCausalLM

import jora
from jora import IA3, InputError
from jora.models.adapted import Dense, Rows, Site

MODULES = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
VARIANTS: dict[str, dict[str, Any]] = {
    "default": MODULES,
    "regex": dict(target_modules=r".*\.[01]\.(self_attn\.[qo]|mlp\.up)_proj", feedforward_modules=r".*\.o_proj"),
    "one layer": dict(target_modules=["1.mlp.down_proj", "q_proj"], feedforward_modules=["1.mlp.down_proj"]),
    "excluded": dict(**MODULES, exclude_modules=["layers.0.self_attn.k_proj"]),
}


def config(**options: Any) -> IA3Config:
    return IA3Config(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways(variant: str, tmp_path: Path) -> None:
    assert_both_ways("llama3", config(**VARIANTS[variant]), tmp_path)


def test_merged_biases_included(tmp_path: Path) -> None:
    model, ids = base("qwen2"), tokens()
    expected = logits(made("qwen2", config(**MODULES), tmp_path / "adapter"), ids)
    adapter = jora.load_adapter(tmp_path / "adapter", model)
    assert_close(model(ids, adapter), expected)
    jora.merge(model, adapter).save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager")
    assert_close(logits(merged.eval(), ids), expected)


def test_a_fresh_adapter_is_the_base_and_the_base_runs_once() -> None:
    model, ids = base("llama3"), tokens()
    fresh = IA3().init(model, jax.random.key(0))
    np.testing.assert_array_equal(model(ids, fresh), model(ids))
    assert {jax.tree_util.keystr(p): x.shape for p, x in jax.tree.leaves_with_path(fresh.state.trained)} == {
        "['down_proj']['input']": (3, 48),
        "['k_proj']['output']": (3, 2, 8),
        "['v_proj']['output']": (3, 2, 8),
    }
    calls = []

    class Counted(Dense):
        def __call__(self, x: Any) -> Any:
            calls.append(x)
            return super().__call__(x)

    bound = IA3().bind(fresh.state, Rows())
    for target in ("k_proj", "down_proj"):
        weight = model.params.layers.weights[target][0]
        axes = (None,) * (weight.ndim - 1)
        dense = Counted(weight, None, (None,), axes, model.layout)
        projection = jax.tree.map(lambda x: x[0], bound.layers[target])
        projection.apply(jax.numpy.ones((1, 2, weight.shape[0])), dense, Site(target, np.int32(0)), Rows())
    assert len(calls) == 2


def test_a_mesh_gives_the_same(tmp_path: Path) -> None:
    single, sharded, ids = base("llama3"), base("llama3", "fsdp=2,tensor=4"), tokens()
    adapter = shaken(IA3(targets=("k_proj", "q_proj", "down_proj")).init(single, jax.random.key(0)))
    jora.save_adapter(adapter, tmp_path / "one")
    there = jora.load_adapter(tmp_path / "one", sharded)
    assert any(
        len(set(map(str, x.sharding.devices_indices_map(x.shape).values()))) > 1 for x in jax.tree.leaves(there.state)
    )
    assert_close(sharded(ids, there), np.asarray(single(ids, adapter)), 1e-5)
    assert_gradients(sharded, there, loaded("llama3", tmp_path / "one", trainable=True), tokens(2, 9))
    jora.save_adapter(there, tmp_path / "many")
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_one_name_is_no_regular_expression() -> None:
    config = base("llama3").config
    assert IA3(feedforward_modules="down_proj").sides(config) == IA3().sides(config)
    with pytest.raises(InputError, match="not a regular expression"):
        IA3(feedforward_modules="*").sides(config)


def test_refused(tmp_path: Path) -> None:
    model = base("llama3")
    with pytest.raises(InputError, match=r"feedforward_modules .* down_proj in some"):
        IA3(feedforward_modules=("layers.0.mlp.down_proj",)).init(model, jax.random.key(0))
    with pytest.raises(InputError, match="lm_head cannot be adapted"):
        IA3(targets=("lm_head",)).init(model, jax.random.key(0))
    adapter = IA3().init(model, jax.random.key(0))
    with pytest.raises(InputError, match=r"ia3: .* not of low rank"):
        adapter.method.to_lora(adapter)
    jora.save_adapter(adapter, tmp_path)
    edit(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(InputError, match="modules_to_save"):
        jora.load_adapter(tmp_path, model)
