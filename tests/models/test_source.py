"""Reading safetensors: slices, many files, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.tiny import assert_close, logits, tiny, tokens
from transformers import AutoModelForCausalLM

import jora
from jora.errors import InputError
from jora.models.saving import save_model
from jora.models.source import SafetensorsSource, read_json

A, B = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(5).astype(ml_dtypes.bfloat16)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def two_files(tmp_path) -> Path:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_names_shapes_and_slices(two_files):
    source = SafetensorsSource(two_files)
    assert source.names() == {"a", "b"}
    assert (source.shape("a"), source.shape("b")) == ((3, 4), (5,))
    assert (source.read("a", (slice(1, 3), slice(2, 3))) == A[1:3, 2:3]).all()
    found = source.read("b", (slice(1, 4),))
    assert found.dtype == ml_dtypes.bfloat16
    assert (found == B[1:4]).all()


def test_files_without_an_index(two_files):
    (two_files / INDEX).unlink()
    assert SafetensorsSource(two_files).names() == {"a", "b"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "two.safetensors").unlink(), "two.safetensors: the index names this file"),
        (lambda d: (d / "two.safetensors").write_bytes((d / "two.safetensors").read_bytes()[:-3]), "not a whole"),
        (lambda d: (d / "two.safetensors").write_bytes(b"\x00"), "not a whole"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {"c": "one.safetensors"}}'), "c is not in the file"),
        (lambda d: (d / INDEX).write_text("{"), "not valid JSON"),
        (lambda d: (d / INDEX).write_text("[]"), "expected a JSON object"),
        (lambda d: [path.unlink() for path in d.iterdir()], "no .safetensors file here"),
    ],
)
def test_damaged_files_are_refused_by_name(two_files, damage, message):
    damage(two_files)
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsSource(two_files)
    assert "\n" not in str(caught.value)
    assert str(two_files) in str(caught.value)


def test_a_missing_json_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "config.json")


def changed(tmp_path: Path, family: str, change) -> Path:
    """A copy of a tiny model after `change(tensors, config)`."""
    shutil.copytree(tiny(family)[1], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t.pop(UP), f"lacks tensor {UP} that"),
        (lambda t, c: [t.pop(UP), t.pop("model.norm.weight")], rf"lacks tensor {UP} \(and 1 more\)"),
        (lambda t, c: t.update(extra=A), "tensor extra that a llama does not have"),
        (lambda t, c: t.update({"model.layers.0.self_attn.q_proj.bias": A[0]}), "q_proj.bias that a llama"),
        (
            lambda t, c: t.update({UP: t[UP][:-1].copy()}),
            rf"{UP} has shape \(47, 32\); config.json asks",
        ),
        (lambda t, c: c.update(num_hidden_layers=1), "tensor model.layers.1"),
        (lambda t, c: c.update(num_hidden_layers=3), "lacks tensor model.layers.2"),
        (lambda t, c: c.update(model_type="bloom"), "model_type 'bloom'"),
        (lambda t, c: c.update(quantization_config={"bits": 4}), "quantization_config"),
    ],
)
def test_a_model_that_does_not_fit_its_config_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as caught:
        jora.load_model(changed(tmp_path, "llama2", change))
    assert "\n" not in str(caught.value)


def test_tensors_that_are_computed_or_stored_twice_are_not_extra(tmp_path):
    def change(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = A[0]

    model = jora.load_model(changed(tmp_path, "llama31", change))
    ids = tokens(1, 5)
    assert_close(model(ids), logits(tiny("llama31")[0], ids))


def test_a_head_of_its_own_is_used_although_the_config_ties_it(tmp_path):
    def change(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5
        tensors["lm_head.weight"][-1] += 1.0

    directory = changed(tmp_path, "llama31", change)
    model = jora.load_model(directory)
    assert not model.config.tied_embeddings
    ids = tokens(1, 5)
    assert_close(model(ids), logits(AutoModelForCausalLM.from_pretrained(directory), ids))
    save_model(model, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_close(model(ids), logits(again, ids))


@pytest.mark.parametrize(
    ("path", "message"),
    [("./nowhere", "no such model"), ("nowhere.gguf", "no such model"), ("a/b/c", "no such model")],
)
def test_a_path_that_is_nothing_is_refused(path, message):
    with pytest.raises(InputError, match=message):
        jora.load_model(path)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="not a model directory"):
        jora.load_model(tmp_path / "model.bin")


def test_a_dtype_that_is_not_known_is_refused():
    with pytest.raises(InputError, match="dtype 'int4'"):
        jora.load_model(tiny("llama2")[1], dtype="int4")
