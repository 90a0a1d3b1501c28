"""modules_to_save and trainable_token_indices against PEFT: both directions, gradients, merging, training."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file
from tests.inference.characters import talking
from tests.methods.gradients import shaken
from tests.methods.peft_configs import assert_gradients, edit, loaded, made
from tests.methods.peft_oracle import base
from tests.tiny import assert_close, logits, tiny, tokens
from tests.train.conftest import examples, losses, options
from transformers import AutoModelForCausalLM

import jora
from jora import InputError, LoRA
from jora.methods.extras.both import MODULES, TOKENS
from jora.models.params import abstract_params

WORDS = [98, 3, 40]
# (family, options beside target_modules, does a merged model untie?)
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "tables and norms": ("llama3", dict(modules_to_save=["embed_tokens", "lm_head", "norm"]), False),
    "one of two": ("qwen25", dict(modules_to_save=["embed_tokens"]), True),
    "the other": ("qwen25", dict(modules_to_save=["lm_head", "k_proj"]), True),  # k_proj has a bias
    "of one layer": ("qwen3", dict(modules_to_save=["1.mlp.up_proj", "layers.0.self_attn.q_norm"]), False),
    "a target": ("llama3", dict(target_modules="all-linear", modules_to_save=["o_proj"]), False),
    "beside DoRA": ("llama3", dict(use_dora=True, modules_to_save=["norm"], trainable_token_indices=WORDS), False),
    "words": ("llama3", dict(trainable_token_indices=WORDS), False),
    "words, tied": ("qwen25", dict(trainable_token_indices=WORDS, modules_to_save=["model.norm"]), False),
    "words by table": ("llama3", dict(trainable_token_indices={"embed_tokens": WORDS, "lm_head": [7, 5]}), False),
    "words by table, tied": ("qwen25", dict(trainable_token_indices={"embed_tokens": WORDS, "lm_head": [7, 5]}), True),
    "words of the head, tied": ("qwen25", dict(trainable_token_indices={"lm_head": [7, 5]}), True),
}


def config(**chosen: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], **chosen})


def merged_logits(merged: Any, directory: Path, ids: np.ndarray) -> np.ndarray:
    merged.save(directory)
    return logits(AutoModelForCausalLM.from_pretrained(str(directory), attn_implementation="eager").eval(), ids)


@pytest.mark.parametrize("case", CASES)
def test_both_ways_and_merged(case: str, tmp_path: Path) -> None:
    family, chosen, unties = CASES[case]
    model = base(family)
    ids = np.concatenate([tokens(1, 29), [[*WORDS, 7]]], axis=1).astype(np.int32)
    expected = logits(made(family, config(**chosen), tmp_path / "theirs"), ids)
    adapter = jora.load_adapter(tmp_path / "theirs", model)
    assert_close(model(ids, adapter), expected)
    jora.save_adapter(adapter, tmp_path / "ours")
    assert_close(logits(loaded(family, tmp_path / "ours"), ids), expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    merged = jora.merge(model, adapter)
    assert merged.unties == unties
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "merging unties")
        assert_close(merged_logits(merged, tmp_path / "merged", ids), expected)


@pytest.mark.parametrize(
    ("family", "mesh", "chosen"),
    [
        ("llama3", None, dict(modules_to_save=["embed_tokens", "lm_head", "norm", "up_proj"])),
        ("llama3", "fsdp=2,tensor=2", dict(modules_to_save=["embed_tokens", "lm_head", "norm", "1.mlp.up_proj"])),
        ("qwen25", None, dict(trainable_token_indices=WORDS, modules_to_save=["v_proj"])),
        ("qwen25", "fsdp=2,tensor=2", dict(trainable_token_indices=WORDS)),
    ],
)
def test_gradients(family: str, mesh: str | None, chosen: dict[str, Any], tmp_path: Path) -> None:
    model = base(family, mesh)
    ids = np.array([[*WORDS, 7, 3, 11, 12, 40]], np.int32)
    peft = made(family, config(**chosen), tmp_path)
    assert_gradients(model, jora.load_adapter(tmp_path, model), peft, np.concatenate([ids, ids[:, ::-1]]))


def test_only_what_is_named_trains(tmp_path: Path) -> None:
    """Shapes of what trains, and so of gradients and moments; a fresh adapter is the base."""
    model, ids = base("qwen25"), tokens()
    method = LoRA(rank=2, targets="q_proj", modules_to_save=["1.mlp.up_proj", "norm"], trainable_token_indices=WORDS)
    fresh = method.init(model, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in fresh.state.trained[MODULES].items()} == {
        "final_norm": (32,),
        "norms.input": (2, 32),
        "norms.mlp": (2, 32),
        "weights.up_proj": (1, 32, 48),
    }
    assert {name: leaf.shape for name, leaf in fresh.state.trained[TOKENS].items()} == {"tied": (3, 32)}
    assert_close(model(ids, fresh), logits(tiny("qwen25")[0], ids))
    jora.save_adapter(fresh, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["1.mlp.up_proj", "norm"]
    assert config["trainable_token_indices"] == WORDS


def test_copies_are_fp32_and_read_in_the_base_s_dtype() -> None:
    model = jora.load_model(tiny("llama3")[1], dtype="bfloat16")
    method = LoRA(rank=2, targets="q_proj", modules_to_save=["lm_head", "norm"], trainable_token_indices=[1])
    adapter = method.init(model, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.state.trained)} == {np.dtype(np.float32)}
    read = method.base(adapter.state, model.params)
    for ours, own in zip(jax.tree.leaves(read), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(ours, own)
        assert ours.dtype == own.dtype


@pytest.mark.slow
def test_trained_resumed_generated_and_merged(tmp_path: Path) -> None:
    _, model = talking("qwen25", tmp_path / "base")
    before = jax.tree.map(np.asarray, model.params)
    words = [int(w) for w in model.tokenizer("abc", add_special_tokens=False).input_ids]
    method = LoRA(rank=2, targets="q_proj", modules_to_save=["norm", "v_proj"], trainable_token_indices=words)
    data, chosen = examples(6), options(max_steps=2, batch_size=2, accumulation=2, save_every=1)
    straight = jora.train(model, method, data, out=tmp_path / "a", options=chosen)
    assert losses(straight)[1] != losses(straight)[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    first = method.init(model, jax.random.key(chosen.seed)).state.trained
    for name, leaf in straight.adapter.state.trained[MODULES].items():
        assert np.abs(leaf - first[MODULES][name]).max() > 1e-3
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000002")
    resumed = jora.train(model, method, data, out=tmp_path / "b", options=dataclasses.replace(chosen, resume=True))
    for a, b in zip(
        jax.tree.leaves(straight.adapter.state.trained), jax.tree.leaves(resumed.adapter.state.trained), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert jora.generate(model, "abcab", resumed.adapter, max_new_tokens=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jora.merge(model, resumed.adapter).save(tmp_path / "merged")  # a tied table stays tied
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), attn_implementation="eager")
    assert_close(model(tokens(1, 9), resumed.adapter), logits(merged.eval(), tokens(1, 9)))


def test_a_mesh_writes_the_same_file(tmp_path: Path) -> None:
    single, sharded = base("llama3"), base("llama3", "fsdp=2,tensor=2")
    method = LoRA(
        rank=2,
        targets="q_proj",
        modules_to_save=["lm_head", "norm", "1.mlp.down_proj"],
        trainable_token_indices=WORDS,
    )
    jora.save_adapter(shaken(method.init(single, jax.random.key(0))), tmp_path / "one")
    there = jora.load_adapter(tmp_path / "one", sharded)
    fresh = method.init(sharded, jax.random.key(0))
    for ours, first in zip(jax.tree.leaves(there.state), jax.tree.leaves(fresh.state), strict=True):
        assert ours.sharding.is_equivalent_to(first.sharding, ours.ndim)
    head = there.state.trained[MODULES]["head"]
    assert head.addressable_shards[0].data.size == head.size // 4
    jora.save_adapter(there, tmp_path / "many")
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2, modules_to_save=("lm_head", "1.mlp.up_proj"), targets="q_proj", trainable_token_indices=WORDS),
        jora.VeRA(rank=3),
        jora.IA3(),
    ],
    ids=lambda method: method.name,
)
def test_estimates_know_the_shapes_without_weights(method: Any) -> None:
    model = base("llama3")
    shapes = abstract_params(model.config, model.layout)
    abstract = dataclasses.replace(model, params=shapes)
    found = jax.eval_shape(lambda key: method.init(abstract, key).state, jax.random.key(0))
    real = method.init(model, jax.random.key(0)).state
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
    # Axes leaf for leaf.
    jax.tree.map(lambda x, axes: model.layout.sharding(axes, x.shape), real, method.axes(model.config))


@pytest.mark.parametrize(
    ("family", "chosen", "message"),
    [
        ("llama3", dict(modules_to_save=["mlp"]), "'mlp' is a block"),
        ("llama3", dict(modules_to_save=["classifier"]), "ends with 'classifier'"),
        ("llama3", dict(targets="q_proj", modules_to_save=["_proj"]), "q_proj of layer 0 is trained by the adapter"),
        ("llama3", dict(targets=["lm_head"], trainable_token_indices={"lm_head": [1]}), "lm_head is trained by the"),
        ("qwen25", dict(modules_to_save=["lm_head"], trainable_token_indices=[1]), "lm_head is trained by modules"),
        ("llama3", dict(trainable_token_indices=[1, 99]), "99 is no word of a vocabulary of 99"),
        ("llama3", dict(trainable_token_indices=[1, 1]), "each once"),
        ("llama3", dict(trainable_token_indices={"q_proj": [1]}), "'q_proj' is no table"),
    ],
)
def test_refused(family: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRA(**{"rank": 2, "targets": "k_proj", **chosen}).init(base(family), jax.random.key(0))


def test_refused_files(tmp_path: Path) -> None:
    model = base("llama3")
    adapter = LoRA(rank=2, targets="q_proj", modules_to_save=["lm_head"]).init(model, jax.random.key(0))
    jora.save_adapter(adapter, tmp_path)
    edit(tmp_path, modules_to_save=["lm_head", "score"])  # PEFT adds such names, and passes over them
    jora.load_adapter(tmp_path, model)
    edit(tmp_path, bias="lora_only")
    with pytest.raises(InputError, match="bias 'lora_only'"):
        jora.load_adapter(tmp_path, model)
    edit(tmp_path, bias="none", modules_to_save=["lm_head", "embed_tokens"])
    with pytest.raises(InputError, match=r"lacks base_model\.model\.model\.embed_tokens\.weight"):
        jora.load_adapter(tmp_path, model)
