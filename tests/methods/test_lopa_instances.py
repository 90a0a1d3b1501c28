"""The vectors of prompts from an encoder: once a text, kept in the run, never in the adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.encoders.tiny_encoders import tiny_encoder, tokenizer
from tests.inference.characters import talking
from tests.train.conftest import OPTIONS

import jora
from jora.data.batches import Shape
from jora.encoders.encoder import BertEncoder
from jora.errors import InputError
from jora.methods.lopa import IDPG, LoPA
from jora.methods.lopa_instances import text_vectors
from jora.methods.method import Adapter
from jora.models.model import Model
from jora.reporting import SILENT
from jora.train import TrainOptions, TrainResult
from jora.train.estimation import abstract_programs

# "w1 w5" occurs three times, "w9" in both sets.
DATA = [{"prompt": p, "completion": c} for p, c in (("w1 w5", "a"), ("w9", "bcd"), ("w1 w5", "ef"), ("w1 w5", "g"))]
HELD_OUT = [{"prompt": "w9", "completion": "ab"}, {"prompt": "w2 w3 w4", "completion": "c"}]
TEXTS = ["w1 w5", "w9", "w2 w3 w4"]
RUN = dataclasses.replace(OPTIONS, max_steps=2, batch_size=2, learning_rate=1e-2, max_length=16)


class Trained(NamedTuple):
    model: Model
    result: TrainResult
    first: Adapter
    encoded: list[str]
    hashes: tuple[str, str]  # of the encoder and the base, before training


def sha(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()


def hashes(model: Model) -> tuple[str, str]:
    files = sorted(Path(tiny_encoder("bert")[1]).iterdir())
    return sha(*(np.frombuffer(f.read_bytes(), np.uint8) for f in files)), sha(*jax.tree.leaves(model.params))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Trained:
    folder = tmp_path_factory.mktemp("lopa")
    model = talking("llama2", folder / "model")[1]
    method = LoPA(prompt_tokens=3, rank=1, hidden=5, encoder=tiny_encoder("bert")[1])
    encoded: list[str] = []
    before = hashes(model)
    with pytest.MonkeyPatch.context() as patch:
        encode = BertEncoder.encode

        def spy(self: Any, texts: Any, reporter: Any = SILENT) -> Any:
            encoded.extend(texts)
            return encode(self, texts, reporter)

        patch.setattr(BertEncoder, "encode", spy)
        result = jora.train(model, method, DATA, out=folder / "run", options=RUN, eval_data=HELD_OUT)
    return Trained(model, result, method.init(model, jax.random.key(RUN.seed)), encoded, before)


def test_only_the_prompt_and_the_heads_change(trained: Trained) -> None:
    assert hashes(trained.model) == trained.hashes
    after = jax.tree.leaves_with_path(trained.result.adapter.state.trained)
    for (path, value), first in zip(after, jax.tree.leaves(trained.first.state.trained), strict=True):
        assert np.abs(np.asarray(value) - np.asarray(first)).max() > 1e-4, jax.tree_util.keystr(path)


def test_each_text_is_encoded_once_and_kept(trained: Trained) -> None:
    assert trained.encoded == TEXTS
    kept = load_file(trained.result.directory / "instances.safetensors")
    found = {row.tobytes(): vector for row, vector in zip(kept["hashes"], kept["vectors"], strict=True)}
    assert found.keys() == {hashlib.sha256(text.encode()).digest() for text in TEXTS}
    hf = tiny_encoder("bert")[0]
    for text in TEXTS:
        with torch.no_grad():
            want = hf(torch.tensor([tokenizer("bert")(text)["input_ids"]])).last_hidden_state[0, 0].numpy()
        np.testing.assert_allclose(found[hashlib.sha256(text.encode()).digest()], want, rtol=0, atol=1e-4 * want.std())


def test_the_adapter_holds_the_heads_alone(trained: Trained) -> None:
    stored = load_file(trained.result.directory / "adapter" / "adapter_model.safetensors")
    heads = {f"{head}.{part}" for head in ("rows", "columns") for part in ("w1", "c1", "w2", "c2")}
    assert stored.keys() == {"prompt", *heads}
    options = json.loads((trained.result.directory / "adapter" / "jora.json").read_text())["options"]
    assert options["encoder_width"] == 32
    assert options["encoder_fingerprint"] == trained.first.method.encoder_fingerprint != ""


def test_a_loaded_adapter_computes_the_same(trained: Trained) -> None:
    adapter = jora.load_adapter(trained.result.directory / "adapter", trained.model)
    assert adapter.method == trained.result.adapter.method
    found = jora.evaluate(trained.model, [*map(example, HELD_OUT)], adapter, max_new_tokens=2)
    assert found.loss == pytest.approx(trained.result.best_loss, rel=1e-5)
    prompts = [trained.model.tokenizer("w9")["input_ids"], trained.model.tokenizer("w2 w3 w4")["input_ids"]]
    vectors = adapter.method.instances(trained.model, prompts)
    texts = text_vectors(BertEncoder(Path(tiny_encoder("bert")[1])), TEXTS[1:])
    np.testing.assert_array_equal(vectors, texts)


def example(line: dict[str, str]) -> Any:
    from jora.data.formats import parse_example

    return parse_example(line)


def test_a_resumed_run_encodes_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertEncoder, "encode", None)
    again = shutil.copytree(trained.result.directory, tmp_path / "run")
    options = dataclasses.replace(RUN, resume=True)
    result = jora.train(
        trained.model, trained.result.adapter.method, DATA, out=again, options=options, eval_data=HELD_OUT
    )
    for ours, theirs in zip(*(jax.tree.leaves(r.adapter.state.trained) for r in (result, trained.result)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (dict(width=16), "makes vectors of 16, the adapter's heads take 32"),
        (dict(seed=1), "not the one that this adapter was trained with"),
    ],
)
def test_another_encoder_is_refused_in_one_line(trained: Trained, encoder: Any, message: str, tmp_path: Path) -> None:
    copied = shutil.copytree(trained.result.directory / "adapter", tmp_path / "adapter")
    config = json.loads((copied / "jora.json").read_text())
    config["options"]["encoder"] = tiny_encoder("bert", **encoder)[1]
    (copied / "jora.json").write_text(json.dumps(config))
    adapter = jora.load_adapter(copied, trained.model)
    with pytest.raises(InputError, match=message) as caught:
        jora.generate(trained.model, "w1", adapter, max_new_tokens=1)
    assert "\n" not in str(caught.value)


def test_vectors_of_another_encoder_are_refused(tmp_path: Path) -> None:
    one, other = (BertEncoder(Path(tiny_encoder("bert", seed=seed)[1])) for seed in (0, 1))
    cache = tmp_path / "instances.safetensors"
    text_vectors(one, ["w1"], cache)
    with pytest.raises(InputError, match="another encoder"):
        text_vectors(other, ["w1"], cache)
    cache.write_bytes(cache.read_bytes()[:-3])
    with pytest.raises(InputError, match="delete it"):
        text_vectors(one, ["w1"], cache)


def test_what_the_cache_has_is_not_encoded(tmp_path: Path) -> None:
    encoder = BertEncoder(Path(tiny_encoder("bert")[1]))
    cache = tmp_path / "instances.safetensors"
    text_vectors(encoder, ["w1", "w2"], cache)
    kept = load_file(cache)
    save_file({**kept, "vectors": kept["vectors"] + 1}, cache, {"encoder": encoder.fingerprint})
    found = text_vectors(encoder, ["w2", "w3", "w2"], cache)
    np.testing.assert_array_equal(found[[0, 2]], kept["vectors"][[1, 1]] + 1)
    np.testing.assert_allclose(found[1], encoder.encode(["w3"])[0], rtol=0, atol=1e-6)
    assert len(load_file(cache)["hashes"]) == 3


def test_packing_is_refused_before_anything_is_encoded(trained: Trained, tmp_path: Path) -> None:
    options = dataclasses.replace(RUN, packing=True)
    with pytest.raises(InputError, match="turn packing off"):
        jora.train(trained.model, trained.first.method, DATA, out=tmp_path / "run", options=options)
    assert not (tmp_path / "run" / "instances.safetensors").exists()


def test_a_failed_start_leaves_its_vectors_to_the_next(tmp_path: Path) -> None:
    from jora.train.record import open_directory

    (tmp_path / "instances.safetensors").touch()
    assert open_directory(tmp_path, resume=False) == tmp_path


def test_planning_encodes_nothing(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BertEncoder, "encode", None)
    method = IDPG(prompt_tokens=3, encoder=tiny_encoder("roberta", width=16)[1])
    programs = abstract_programs(trained.model.config, trained.model.layout, method, TrainOptions(), np.float32)
    traced = programs.trace_train(Shape(2, 16, 8), programs.program)
    assert (1, 2, 16) in [x.shape for x in traced.jaxpr.in_avals]
