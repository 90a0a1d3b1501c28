"""The method that docs/new-method.md writes outside the package runs: trained, stored, generated with and merged."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.inference.characters import talking
from tests.tiny import assert_close, logits, tokens
from transformers import AutoModelForCausalLM

import jora
from jora.methods import registry

PAGE = Path(__file__).parents[2] / "docs" / "new-method.md"
METHOD, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def outside() -> Iterator[types.ModuleType]:
    """The page's first block as a module that somebody imported."""
    module = types.ModuleType("outside")
    sys.modules["outside"] = module
    exec(compile(METHOD, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules["outside"], registry._registered["output-scale"]


def test_it_is_short() -> None:
    assert len(METHOD.splitlines()) <= 60


@pytest.mark.slow
def test_trained_stored_generated_and_merged(
    outside: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talking("qwen2", tmp_path / "model")  # has biases
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}] for q in ("abc", "de", "fgh")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns))
    found = {}
    for name, use in (
        ("one", USE),
        ("two", USE.replace('load_model("model")', 'load_model("model", mesh="tensor=2")')),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for given in ("model", "train.jsonl"):
            Path(given).symlink_to(tmp_path / given)
        exec(compile(use, str(PAGE), "exec"), outside.__dict__)
        found[name] = (outside.model, outside.adapter, capsys.readouterr().out)
        assert json.loads(Path("run/adapter/jora.json").read_text())["method"] == "output-scale"
        for loaded, trained in zip(
            jax.tree.leaves(outside.adapter.state), jax.tree.leaves(outside.result.adapter.state), strict=True
        ):
            np.testing.assert_array_equal(loaded, trained)
            assert np.abs(trained).max() > 0.01
    (model, adapter, text), (_, there, other_text) = found["one"], found["two"]
    assert len(there.state.trained["q_proj"].sharding.device_set) == 2
    for ours, one in zip(jax.tree.leaves(there.state), jax.tree.leaves(adapter.state), strict=True):
        assert_close(ours, np.asarray(one), 1e-4)  # AdamW's first steps magnify rounding
    assert text == other_text
    ids = tokens(1, 9)
    expected = np.asarray(model(ids, adapter))
    assert np.abs(expected - model(ids)).max() > 0.01 * expected.std()
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "one" / "merged"), attn_implementation="eager")
    assert_close(logits(merged.eval(), ids), expected)


def test_it_is_chosen_by_name(outside: types.ModuleType) -> None:
    assert registry.method_class("output-scale") is outside.OutputScale
    assert "output-scale" in registry.names()
    assert jora.register_method is registry.register
    with pytest.raises(ValueError, match="built-in"):
        jora.register_method(type("Mine", (), {"name": "lora"}))
