"""VeRA against PEFT: both directions, gradients, meshes, merging, and what is refused."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import VeraConfig
from safetensors.numpy import load_file, save_file
from tests.methods.gradients import shaken
from tests.methods.peft_configs import assert_both_ways, assert_gradients, edit, loaded, made
from tests.methods.peft_oracle import base
from tests.tiny import assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora import InputError, VeRA
from jora.models import decoder
from jora.models.adapted import Rows

VARIANTS: dict[str, dict[str, Any]] = {
    "all linears": dict(target_modules="all-linear", r=7, d_initial=0.3),
    "some layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], r=40),
    "regex": dict(target_modules=r".*\.1\.(self_attn\.[qv]|mlp\.up)_proj", r=4),
}


def config(**options: Any) -> VeraConfig:
    return VeraConfig(task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_ways(variant: str, tmp_path: Path) -> None:
    assert_both_ways("llama3", config(**VARIANTS[variant]), tmp_path)


def test_a_fresh_adapter_is_the_base_with_the_projections_of_its_key(tmp_path: Path) -> None:
    model, ids = base("llama3"), tokens()
    method = VeRA(rank=5, targets=("q_proj", "down_proj"))
    fresh, other = (method.init(model, jax.random.key(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(model(ids, fresh), model(ids))
    projections = fresh.state.constant["projections"]
    assert {name: x.shape for name, x in projections.items()} == {"a": (48, 5), "b": (5, 32)}
    for name, inputs in (("a", 48), ("b", 5)):  # PEFT's kaiming bound
        bound = np.sqrt(6 / inputs)
        assert 0.9 * bound < np.abs(projections[name]).max() <= bound
        np.testing.assert_array_equal(projections[name], other.state.constant["projections"][name])
    another = dataclasses.replace(method, projection_prng_key=1).init(model, jax.random.key(0))
    assert np.abs(another.state.constant["projections"]["a"] - projections["a"]).max() > 0.1
    # Two vectors a linear train, and nothing else: 3 layers x (r + out).
    assert sum(x.size for x in jax.tree.leaves(fresh.state.trained)) == 3 * (5 + 32) + 3 * (5 + 32)
    jora.save_adapter(fresh, tmp_path)
    assert_close(logits(loaded("llama3", tmp_path), ids), logits(tiny("llama3")[0], ids))


@pytest.mark.parametrize("mesh", [None, "fsdp=2,tensor=2"])
def test_gradients(mesh: str | None, tmp_path: Path) -> None:
    model = base("llama3", mesh)
    peft = made("llama3", config(target_modules=["q_proj", "o_proj", "down_proj"], r=6), tmp_path)
    assert_gradients(model, jora.load_adapter(tmp_path, model), peft, tokens(2, 9))


def test_dropout_scales_what_it_keeps() -> None:
    """d (A x) summed over many seeds is that without dropout; evaluation has none."""
    model, ids = base("llama3"), jnp.asarray(tokens(1, 5))
    adapter = shaken(VeRA(rank=4, targets="down_proj", dropout=0.5).init(model, jax.random.key(0)))
    bound = adapter.method.bind(adapter.state, Rows())

    @jax.jit
    def hidden(seeds: Any) -> Any:
        rows = Rows(seeds)
        return decoder.forward(model.params, model.config, model.layout, ids, bound=bound, rows=rows)[0]

    one, two = (hidden(jnp.array([seed], jnp.uint32)) for seed in (1, 2))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, hidden(jnp.array([1], jnp.uint32)))
    still = dataclasses.replace(adapter, method=dataclasses.replace(adapter.method, dropout=0.0))
    np.testing.assert_array_equal(model(ids, adapter), model(ids, still))


def test_to_lora_and_merged(tmp_path: Path) -> None:
    model, ids = base("gemma"), tokens()
    expected = logits(made("gemma", config(target_modules=["q_proj", "o_proj", "down_proj"], r=9), tmp_path / "a"), ids)
    adapter = jora.load_adapter(tmp_path / "a", model)
    plain = adapter.method.to_lora(adapter)
    assert plain.method.name == "lora"
    assert_close(model(ids, plain), expected)
    jora.merge(model, adapter).save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager")
    assert_close(logits(merged.eval(), ids), expected)


def test_files_of_a_mesh_are_those_of_one_device(tmp_path: Path) -> None:
    single, sharded, ids = base("llama3"), base("llama3", "fsdp=2,tensor=2"), tokens()
    method = VeRA(rank=5, layers_to_transform=(1,))
    adapter = shaken(method.init(single, jax.random.key(0)))
    jora.save_adapter(adapter, tmp_path / "one")
    there = jora.load_adapter(tmp_path / "one", sharded)
    for ours, fresh in zip(
        jax.tree.leaves(there.state), jax.tree.leaves(method.init(sharded, jax.random.key(0)).state), strict=True
    ):
        assert ours.sharding.is_equivalent_to(fresh.sharding, ours.ndim)
    assert len(there.state.trained["q_proj"]["b"].sharding.device_set) == 4
    assert_close(sharded(ids, there), np.asarray(single(ids, adapter)), 1e-5)
    jora.save_adapter(there, tmp_path / "many")
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_refused(tmp_path: Path) -> None:
    model = base("llama3")
    for options, message in (
        (dict(rank=0), "rank"),
        (dict(dropout=1.0), "dropout"),
        (dict(targets=("lm_head",)), "lm_head cannot be adapted"),
        (dict(targets=("embed_tokens",)), "embed_tokens cannot be adapted"),
    ):
        with pytest.raises(InputError, match=message):
            VeRA(**options).init(model, jax.random.key(0))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made("llama3", config(target_modules=["q_proj"], r=4, save_projection=False), tmp_path)
    with pytest.raises(InputError, match=r"lacks base_model\.vera_A.*save_projection=True"):
        jora.load_adapter(tmp_path, model)
    made("llama3", config(target_modules=["q_proj"], r=4), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "base_model.vera_A": np.ones((4, 33), np.float32)}, path)
    with pytest.raises(InputError, match=r"vera_A has shape \(4, 33\)"):
        jora.load_adapter(tmp_path, model)
    save_file(weights, path)
    edit(tmp_path, bias="vera_only")
    with pytest.raises(InputError, match="bias 'vera_only'"):
        jora.load_adapter(tmp_path, model)
