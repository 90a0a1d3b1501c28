"""Adapters travel between Jora and PEFT without a change of logits; what cannot is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.methods.peft_oracle import LINEARS, RICH, base, peft_loaded, peft_made, random_adapter
from tests.tiny import FAMILIES, assert_close, logits, tiny, tokens

from jora import InputError, LoRA
from jora.methods.peft.lora import to_peft
from jora.methods.storage import load_adapter, save_adapter

# What one family shows for all.
VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": dict(targets="all-linear", rank=4, alpha=2),
    "one name": dict(targets=["v_proj"], rank=2, alpha=8),
    "regex": dict(targets=r".*\.1\.self_attn\.[qv]_proj", rank=4, alpha=8, rank_pattern={"v_proj": 1}),
    "some layers": dict(targets=["q_proj", "down_proj", "lm_head"], rank=2, layers_to_transform=[1]),
    "whole names": dict(targets=["model.layers.1.mlp.up_proj", "k_proj"], rank=2, layers_to_transform=0),
    "excluded": dict(targets=LINEARS, rank=2, exclude_modules=["layers.0.self_attn.q_proj", "gate_proj"]),
    "excluded by regex": dict(targets="all-linear", rank=2, exclude_modules=r".*\.mlp\..*"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_in_peft(family: str, tmp_path: Path) -> None:
    model, ids = base(family), tokens()
    adapter = random_adapter(model, **RICH)
    save_adapter(adapter, tmp_path / "adapter")
    peft = peft_loaded(family, tmp_path / "adapter")
    expected = logits(peft, ids)
    assert_close(model(ids, adapter), expected)
    assert np.abs(expected - logits(tiny(family)[0], ids)).max() > 0.1 * expected.std()  # the adapter acts


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_in_ours(family: str, tmp_path: Path) -> None:
    model, ids = base(family), tokens()
    peft = peft_made(family, tmp_path, **RICH)
    assert_close(model(ids, load_adapter(tmp_path, model)), logits(peft, ids))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_both_ways(variant: str, tmp_path: Path) -> None:
    family, options, ids = "llama3", VARIANTS[variant], tokens()
    model = base(family)
    peft = peft_made(family, tmp_path / "theirs", **options)
    loaded = load_adapter(tmp_path / "theirs", model)
    expected = logits(peft, ids)
    assert_close(model(ids, loaded), expected)
    save_adapter(loaded, tmp_path / "ours")
    assert_close(logits(peft_loaded(family, tmp_path / "ours"), ids), expected)
    # The same modules, names and true ranks as PEFT writes.
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert {n: a.shape for n, a in ours.items()} == {n: a.shape for n, a in theirs.items() if "base_layer" not in n}
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize(
    "options",
    [
        # PEFT allows neither with layers_to_transform.
        dict(targets="all-linear", layers_to_transform=[0]),
        dict(targets=r".*[qk]_proj", layers_to_transform=[0, 2]),
        # PEFT would match modules that cannot be adapted: the attention itself, its norms.
        dict(targets=r".*self_attn.*", exclude_modules=r".*o_proj"),
        dict(targets="lm_head"),
    ],
)
def test_what_peft_cannot_say_is_written_as_names(options: dict[str, Any], tmp_path: Path) -> None:
    model, ids = base("llama3"), tokens()
    adapter = random_adapter(model, rank=2, **options)
    save_adapter(adapter, tmp_path / "a")
    assert_close(model(ids, adapter), logits(peft_loaded("llama3", tmp_path / "a"), ids))


def test_files_hold_true_ranks_and_adapted_modules_only(tmp_path: Path) -> None:
    model = base("llama3")
    adapter = random_adapter(
        model, targets=["q_proj", "embed_tokens"], rank=2, rank_pattern={"layers.1.self_attn.q_proj": 7}
    )
    save_adapter(adapter, tmp_path / "a")
    prefix = "base_model.model.model"
    assert {n: a.shape for n, a in load_file(tmp_path / "a" / "adapter_model.safetensors").items()} == {
        f"{prefix}.embed_tokens.lora_embedding_A": (2, 99),
        f"{prefix}.embed_tokens.lora_embedding_B": (32, 2),
        **{f"{prefix}.layers.{i}.self_attn.q_proj.lora_A.weight": (7 if i == 1 else 2, 32) for i in range(3)},
        **{f"{prefix}.layers.{i}.self_attn.q_proj.lora_B.weight": (32, 7 if i == 1 else 2) for i in range(3)},
    }
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny("llama3")[1]
    identity = json.loads((tmp_path / "a" / "jora.json").read_text())
    assert identity["base"] == model.identity


def test_save_and_load_keep_options_and_state(tmp_path: Path) -> None:
    model = base("gemma3")
    adapter = random_adapter(model, **RICH)
    save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(str(tmp_path / "a"), model)
    assert loaded.method.sites(model.config) == adapter.method.sites(model.config)
    assert loaded.method.dropout == adapter.method.dropout
    assert loaded.base == adapter.base
    for a, b in zip(jax.tree.leaves(loaded.state), jax.tree.leaves(adapter.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(loaded.state) == jax.tree.structure(adapter.state)


def test_adapters_cross_meshes(tmp_path: Path) -> None:
    """An adapter of a sharded model is gathered into the same file, and loads with init's shardings."""
    single, sharded = base("llama3"), base("llama3", "fsdp=2,tensor=4")
    adapter = random_adapter(single, **RICH)
    save_adapter(adapter, tmp_path / "single")
    loaded = load_adapter(tmp_path / "single", sharded)
    fresh = LoRA(**RICH).init(sharded, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(loaded.state), jax.tree.leaves(fresh.state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    assert any(len(a.sharding.device_set) == 8 for a in jax.tree.leaves(loaded.state))
    save_adapter(loaded, tmp_path / "sharded")
    name = "adapter_model.safetensors"
    assert (tmp_path / "single" / name).read_bytes() == (tmp_path / "sharded" / name).read_bytes()


def test_half_precision_factors_load_as_fp32(tmp_path: Path) -> None:
    model, ids = base("llama3"), tokens()
    peft = peft_made("llama3", tmp_path, targets=["q_proj"], rank=2)
    path = tmp_path / "adapter_model.safetensors"
    save_file({n: a.astype(np.float16) for n, a in load_file(path).items()}, path)
    loaded = load_adapter(tmp_path, model)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.state))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.half().float())
    assert_close(model(ids, loaded), logits(peft, ids))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peft") / "adapter"
    peft_made("llama3", directory, targets=["q_proj", "v_proj"], rank=2)
    return directory


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Any) -> None:
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "LOHA"),
        ("lora_bias", True),
        ("bias", "all"),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [5]),
        ("target_parameters", ["mlp.experts"]),
        ("fan_in_fan_out", True),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layers_pattern", "blocks"),
        ("an_option_of_the_future", 3),
        ("r", "16"),
        ("target_modules", None),
        ("target_modules", ["query"]),
        ("target_modules", 5),
        ("lora_dropout", "a lot"),
        ("layers_to_transform", ["1"]),
        ("rank_pattern", [1]),
    ],
)
def test_refused_options(copied: Path, option: str, value: Any) -> None:
    edit_config(copied, **{option: value})
    with pytest.raises(InputError, match=option):
        load_adapter(copied, base("llama3"))


def test_one_name_is_no_regular_expression() -> None:
    """It would match no whole module name, and so exclude nothing without a word."""
    config = base("llama3").config
    named, listed = LoRA(exclude_modules="q_proj"), LoRA(exclude_modules=["q_proj"])
    assert named.sites(config) == listed.sites(config) and "q_proj" not in named.sites(config)
    assert to_peft(named, config) == to_peft(listed, config)
    with pytest.raises(InputError, match="not a regular expression"):
        LoRA(rank_pattern={"*": 4}).sites(config)


@pytest.mark.parametrize("init", ["gaussian", "eva", False])
def test_plain_initialisations_load(copied: Path, init: Any) -> None:
    edit_config(copied, init_lora_weights=init)
    load_adapter(copied, base("llama3"))


def drop(weights: dict[str, np.ndarray]) -> None:
    del weights[A0]


def add(weights: dict[str, np.ndarray]) -> None:
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"] = np.ones(3, np.float32)


def widen(weights: dict[str, np.ndarray]) -> None:
    weights[A0] = np.ones((2, 33), np.float32)


def poison(weights: dict[str, np.ndarray]) -> None:
    weights[A0][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, re.escape(A0)),
        (add, "lora_magnitude_vector"),
        (widen, re.escape(A0) + r".*\(2, 33\).*\(2, 32\)"),
        (poison, re.escape(A0) + ".*NaN"),
    ],
)
def test_refused_tensors(copied: Path, change: Any, message: str) -> None:
    edit_weights(copied, change)
    with pytest.raises(InputError, match=message):
        load_adapter(copied, base("llama3"))


def test_changed_base_weights_in_the_file_are_refused(tmp_path: Path) -> None:
    peft_made("llama3", tmp_path, targets=["embed_tokens"], rank=2)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    load_adapter(tmp_path, base("llama3"))
    edit_weights(tmp_path, lambda weights: weights[name].__setitem__((98, 3), 1.0))
    with pytest.raises(InputError, match=r"embed_tokens\.base_layer"):
        load_adapter(tmp_path, base("llama3"))


def test_pickled_and_missing_files_are_refused(copied: Path, tmp_path: Path) -> None:
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(InputError, match="safe_serialization"):
        load_adapter(copied, base("llama3"))
    (copied / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_adapter(copied, base("llama3"))
    with pytest.raises(InputError, match="no such adapter"):
        load_adapter(tmp_path / "nowhere", base("llama3"))
    with pytest.raises(InputError, match=r"holds no adapter_config\.json"):
        load_adapter(tiny("llama3")[1], base("llama3"))


def test_another_base_is_warned_of(copied: Path, tmp_path: Path) -> None:
    model = base("llama3")
    save_adapter(load_adapter(copied, model), tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tmp_path / "ours", model)
    record = tmp_path / "ours" / "jora.json"
    record.write_text(json.dumps({"base": {"name": "some/model", "fingerprint": "0"}}))
    with pytest.warns(UserWarning, match=f"some/model.*{re.escape(model.identity['name'])}"):
        load_adapter(tmp_path / "ours", model)
    edit_config(copied, base_model_name_or_path="org/another")
    with pytest.warns(UserWarning, match="org/another"):
        load_adapter(copied, model)


def test_a_directory_of_other_files_is_not_replaced(copied: Path, tmp_path: Path) -> None:
    model = base("llama3")
    adapter = load_adapter(copied, model)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="other files"):
        save_adapter(adapter, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    save_adapter(adapter, copied)  # an adapter's own directory is
