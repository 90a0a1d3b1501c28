"""The JAX encoder against transformers, in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tests.encoders.tiny_encoders import KINDS, TOKENS, WORDS, tiny_encoder, tokenizer

from jora.encoders import open_encoder
from jora.encoders.bert import hidden_states, load_params
from jora.encoders.config import config_from_hf
from jora.encoders.encoder import BertEncoder
from jora.errors import InputError
from jora.models.source import SafetensorsSource

LENGTHS = (24, 3, 11, 17)


def batch(pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Random words behind a first token, padded on the right to 24."""
    draw = np.random.default_rng(0)
    mask = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
    tokens = draw.integers(4, 44, mask.shape).astype(np.int32)
    return np.where(mask, tokens, pad), mask


def expected(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    core = getattr(model, "bert", model)
    with torch.no_grad():
        ids, attention = torch.tensor(tokens.astype(np.int64)), torch.tensor(mask.astype(np.int64))
        return core(input_ids=ids, attention_mask=attention).last_hidden_state.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_transformers(kind: str) -> None:
    hf, path = tiny_encoder(kind)
    encoder = open_encoder(path)
    assert isinstance(encoder, BertEncoder)
    tokens, mask = batch(encoder.config.pad_id)
    params = load_params(SafetensorsSource(Path(path)), encoder.config, path)
    found = np.asarray(hidden_states(params, tokens, mask, config=encoder.config))
    want = expected(hf, tokens, mask)
    assert np.abs(found - want)[mask].max() <= 1e-4 * want[mask].std()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_texts_vector_does_not_depend_on_the_others(kind: str) -> None:
    """Twenty texts (more than a batch) of 1 to 20 words, and each alone in transformers, without padding."""
    hf, path = tiny_encoder(kind)
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(WORDS, n)) for n in range(1, 21)]
    found = open_encoder(path).encode(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = np.array([tokenizer(kind)(text)["input_ids"]])
        want = expected(hf, ids, np.ones_like(ids))[0, 0]
        np.testing.assert_allclose(vector, want, rtol=0, atol=1e-4 * want.std())


def test_long_texts_lose_their_beginning() -> None:
    _, path = tiny_encoder("roberta")
    long = " ".join(WORDS)
    (ids,) = open_encoder(path).tokens([long])  # type: ignore[attr-defined]
    assert len(ids) == TOKENS
    assert ids == [0, *(4 + n for n in range(40 - (TOKENS - 2), 40)), 2]
    encoder = open_encoder(path)
    kept = " ".join(WORDS[-(TOKENS - 2) :])
    np.testing.assert_array_equal(*encoder.encode([long, kept]))


def test_names_of_old_checkpoints(tmp_path: Path) -> None:
    """google-bert/bert-base-uncased still calls a norm's weight gamma."""
    _, path = tiny_encoder("bert")
    shutil.copytree(path, tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    renamed = {
        "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in weights.items()
    }
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    texts = ["w1 w2 w3", "w7"]
    np.testing.assert_array_equal(open_encoder(str(tmp_path / "old")).encode(texts), open_encoder(path).encode(texts))


def test_the_fingerprint_tells_encoders_apart(tmp_path: Path) -> None:
    _, path = tiny_encoder("bert")
    other = open_encoder(tiny_encoder("bert", seed=1)[1])
    moved = shutil.copytree(path, tmp_path / "moved")
    assert open_encoder(path).fingerprint == open_encoder(str(moved)).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "deberta"),
        ("hidden_act", "silu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
    ],
)
def test_what_is_not_computed_is_refused(option: str, value: Any) -> None:
    hf = json.loads((Path(tiny_encoder("bert")[1]) / "config.json").read_text())
    with pytest.raises(InputError, match=option):
        config_from_hf({**hf, option: value}, "config.json")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder("bert")[1], tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.bias"):
        open_encoder(str(tmp_path / "cut")).encode(["w1"])


def test_no_encoder_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model"):
        open_encoder(str(tmp_path / "nothing"))
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="not a model directory"):
        open_encoder(str(tmp_path / "model.gguf"))
