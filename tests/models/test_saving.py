"""Hugging Face directories that we write: the same tensors, files and behaviour as what was read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tests.tiny import FAMILIES, logits, tiny, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from jora import InputError, load_model
from jora.models import saving
from jora.models.safetensors_file import Entry, write_safetensors
from jora.models.saving import save_model


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_what_was_loaded(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "BLOCK", 1 << 10)  # many blocks a tensor, the last one shorter
    hf, directory = tiny(family)
    mesh = "fsdp=2,tensor=4" if family in ("llama3", "qwen2", "gemma3") else None
    save_model(load_model(directory, mesh=mesh), tmp_path / "out")
    source, stored = (load_file(Path(d) / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert stored.keys() == source.keys()
    for name, value in source.items():
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(stored[name], value)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((Path(directory) / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), attn_implementation="eager")
    np.testing.assert_array_equal(logits(loaded.eval(), tokens()), logits(hf, tokens()))


def test_shards_and_their_index(tmp_path: Path) -> None:
    hf, directory = tiny("llama3")
    model = load_model(directory, dtype="bfloat16")
    save_model(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    source = load_file(Path(directory) / "model.safetensors")
    assert index["weight_map"].keys() == source.keys()
    assert index["metadata"]["total_size"] == 2 * sum(a.size for a in source.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
                np.testing.assert_array_equal(file.get_tensor(name), source[name].astype(ml_dtypes.bfloat16))
        assert path.stat().st_size < 23_000
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path), attn_implementation="eager")
    assert str(loaded.dtype) == "torch.bfloat16"
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(tmp_path).config == model.config
    del hf


def test_config_keeps_its_own_dtype_key(tmp_path: Path) -> None:
    """transformers before 4.56 reads torch_dtype."""
    shutil.copytree(tiny("llama3")[1], tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_model(load_model(tmp_path / "old", dtype="bfloat16"), tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written


def test_tokenizer_and_generation_files_come_along(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama3")[1], source)
    vocabulary = {f"w{i}": i for i in range(99)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")),
        unk_token="w0",
        chat_template="{{ messages }}",
    ).save_pretrained(str(source))
    (source / "notes.txt").write_text("not the model's")
    save_model(load_model(source), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "notes.txt").exists()
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.get_vocab() == vocabulary and tokenizer.chat_template == "{{ messages }}"


def test_a_model_may_replace_its_own_source(tmp_path: Path) -> None:
    shutil.copytree(tiny("qwen2")[1], tmp_path / "model")
    save_model(load_model(tmp_path / "model"), tmp_path / "model")
    expected = load_file(Path(tiny("qwen2")[1]) / "model.safetensors")
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        np.testing.assert_array_equal(value, expected[name])


def test_what_stands_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny("llama2")[1])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="other files"):
        save_model(model, tmp_path / "thesis")
    with pytest.raises(InputError, match="is a file"):
        save_model(model, tmp_path / "thesis" / "chapter.txt")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"

    save_model(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(saving, "_copy_companions", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_float16_overflow_is_refused_by_name(tmp_path: Path) -> None:
    entry = Entry("model.norm.weight", (2,), lambda: [np.array([1.0, 1e6], np.float32)])
    with pytest.raises(InputError, match=r"model\.norm\.weight.*float16"):
        write_safetensors(tmp_path / "x.safetensors", [entry], np.dtype(np.float16))
