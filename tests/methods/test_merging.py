"""Merged directories: transformers loads them, and they say what base and adapter said."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.methods.peft_oracle import RICH, base, peft_loaded, peft_made, random_adapter
from tests.tiny import FAMILIES, assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora import load_model
from jora.methods.merging import merge
from jora.methods.storage import load_adapter, save_adapter

TIED = {"llama31", "qwen25", "gemma", "gemma2", "gemma3"}


def transformers_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(str(directory), attn_implementation="eager")
    return logits(model.eval().float(), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_in_transformers(family: str, tmp_path: Path) -> None:
    """Every linear, the embedding and the output layer, under rsLoRA with alpha != rank."""
    model, ids = base(family), tokens()
    peft = peft_made(family, tmp_path / "adapter", **RICH)
    merged = merge(model, load_adapter(tmp_path / "adapter", model))
    if family in TIED:
        with pytest.warns(UserWarning, match="unties"):
            merged.save(tmp_path / "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    else:
        merged.save(tmp_path / "merged")
    expected = logits(peft, ids)
    assert_close(transformers_logits(tmp_path / "merged", ids), expected)
    assert_close(load_model(tmp_path / "merged")(ids), expected)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_table_changes_in_one_use_only(target: str, tmp_path: Path) -> None:
    model, ids = base("qwen25"), tokens()
    adapter = random_adapter(model, targets=[target], rank=2, alpha=3)
    save_adapter(adapter, tmp_path / "adapter")

    class Heard:
        notes: list[str] = []  # noqa: RUF012

        def start(self, total: int | None, what: str, done: int = 0) -> None: ...
        def update(self, done: int, **fields: Any) -> None: ...
        def finish(self, **fields: Any) -> None: ...
        def note(self, text: str) -> None:
            self.notes.append(text)

    merge(model, adapter).save(tmp_path / "merged", reporter=Heard())  # a note in place of the warning
    assert "unties" in Heard.notes[0]
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    table = np.asarray(model.params.embed)[:99]
    same, changed = ("lm_head", "model.embed_tokens") if target == "embed_tokens" else ("model.embed_tokens", "lm_head")
    np.testing.assert_array_equal(stored[f"{same}.weight"], table)
    assert np.abs(stored[f"{changed}.weight"] - table).max() > 0.01
    expected = logits(peft_loaded("qwen25", tmp_path / "adapter"), ids)
    assert_close(transformers_logits(tmp_path / "merged", ids), expected)


def test_linears_of_a_tied_model_stay_tied(tmp_path: Path) -> None:
    model = base("qwen25")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jora.merge(model, random_adapter(model, rank=2)).save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_the_sum_is_taken_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    model = load_model(tiny("llama3")[1], dtype="bfloat16")
    adapter = random_adapter(model, targets=["q_proj"], rank=3, alpha=4, layers_to_transform=[1])
    merge(model, adapter).save(tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {a.dtype for a in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    a, b = (np.asarray(adapter.state.trained["q_proj"][f][1], np.float32) for f in "ab")
    source = load_file(Path(tiny("llama3")[1]) / "model.safetensors")
    name = "model.layers.{}.self_attn.q_proj.weight"
    rounded = source[name.format(1)].astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = rounded + np.float32(4 / 3) * (b.reshape(3, -1).T @ a.T)
    difference = stored[name.format(1)].astype(np.float32) - expected
    assert np.abs(difference / expected).max() <= 2.0**-8
    np.testing.assert_array_equal(stored[name.format(0)], source[name.format(0)].astype(ml_dtypes.bfloat16))


def test_a_sharded_model_merges_to_the_same_numbers(tmp_path: Path) -> None:
    single, sharded = base("llama3"), base("llama3", "fsdp=2,tensor=4")
    adapter = random_adapter(single, **RICH)
    save_adapter(adapter, tmp_path / "adapter")
    merge(single, adapter).save(tmp_path / "one")
    merge(sharded, load_adapter(tmp_path / "adapter", sharded)).save(tmp_path / "eight")
    one, eight = (load_file(tmp_path / side / "model.safetensors") for side in ("one", "eight"))
    assert one.keys() == eight.keys()
    for name, value in one.items():
        np.testing.assert_allclose(value, eight[name], rtol=0, atol=1e-6)


def test_a_fresh_adapter_merges_to_the_base(tmp_path: Path) -> None:
    model = base("llama3")
    merge(model, jora.LoRA(rank=2).init(model, jax.random.key(0))).save(tmp_path)
    stored, source = load_file(tmp_path / "model.safetensors"), load_file(Path(tiny("llama3")[1]) / "model.safetensors")
    assert stored.keys() == source.keys()
    for name, value in source.items():
        np.testing.assert_array_equal(stored[name], value)
    assert jnp.asarray(stored["model.norm.weight"]).dtype == jnp.float32


def test_an_adapter_of_another_model_is_refused() -> None:
    adapter = random_adapter(base("llama2"), rank=2)
    with pytest.raises(jora.InputError, match=r"made for a llama 2 x 32 .* this model is a qwen2"):
        merge(base("qwen2"), adapter)
    with pytest.raises(jora.InputError, match="made for a llama"):
        base("qwen2")(tokens(), adapter)
