"""GGUF to Hugging Face directories: transformers loads what we write and computes what was in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file
from tests.models.gguf.conftest import FAMILIES, _config_of, write_gguf
from tests.tiny import assert_close, logits

from jora import InputError
from jora.models.convert import convert


def make(family: str, path: Path, **options: Any) -> transformers.PreTrainedModel:
    """A random model, written as llama.cpp would."""
    architecture, config = _config_of(family, {})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.0 if "gemma" in family or "bias" in name else 1.0, 0.2)
    write_gguf(path, architecture, model, **options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_in_transformers(family: str, tmp_path: Path) -> None:
    hf = make(family, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), attn_implementation="eager")
    assert loaded.dtype == torch.float32 and type(loaded) is type(hf)
    ids = np.random.default_rng(0).integers(0, 320, (2, 24))
    assert_close(logits(loaded.eval(), ids), logits(hf, ids))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.convert_tokens_to_ids("t5") == 8 and tokenizer.eos_token_id == 2


@pytest.mark.parametrize(
    ("kind", "asked", "written"),
    [
        (Kind.F16, "auto", np.float16),
        (Kind.BF16, "auto", ml_dtypes.bfloat16),
        (Kind.Q8_0, "auto", ml_dtypes.bfloat16),
        (Kind.Q8_0, "float32", np.float32),
        (Kind.F32, "float16", np.float16),
    ],
)
def test_dtypes(kind: Kind, asked: Any, written: Any, tmp_path: Path) -> None:
    hf = make("qwen2", tmp_path / "model.gguf", kind=kind)
    convert(tmp_path / "model.gguf", tmp_path / "out", dtype=asked, max_shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    stored = {n: a for path in (tmp_path / "out").glob("*.safetensors") for n, a in load_file(path).items()}
    assert {a.dtype for a in stored.values()} == {np.dtype(written)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == np.dtype(written).name
    name = "model.layers.1.mlp.up_proj.weight"
    value = hf.state_dict()[name].numpy()
    if kind is not Kind.F32:
        value = gguf.dequantize(gguf.quantize(value, kind), kind)
    np.testing.assert_array_equal(stored[name], value.astype(written))


def test_refusals(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "model.gguf")
    with pytest.raises(InputError, match=r"reads a \.gguf file"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="dtype 'int8'"):
        convert(tmp_path / "model.gguf", tmp_path / "out", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other files"):
        convert(tmp_path / "model.gguf", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
