"""A model directory whose tokenizer is missing or damaged is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.bytewise import bytewise_tokenizer

from jora.errors import InputError
from jora.models import model
from jora.models.model import load_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with a whole tokenizer."""
    bytewise_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    return tmp_path


def refused(directory: Path, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("tokenizer.json", content) for content in ("", "{", "[]", "{}", '{"added_tokens": []}', "oid sha256:0")),
        *(("tokenizer_config.json", content) for content in ("", "{", "[]")),
    ],
)
def test_a_damaged_file(directory: Path, name: str, content: str) -> None:
    (directory / name).write_text(content)
    refused(directory, r"its tokenizer cannot be read \(.+\); copy the model's tokenizer files here again")


def test_half_a_file(directory: Path) -> None:
    file = directory / "tokenizer.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(directory, "its tokenizer cannot be read")


def test_settings_without_a_vocabulary(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    refused(directory, "no tokenizer.json here; copy the model's tokenizer files")
    (directory / "tokenizer_config.json").write_text("{}")  # of which transformers makes a tokenizer of five tokens
    refused(directory, "no tokenizer.json here; copy the model's tokenizer files")


def test_a_sentencepiece_file_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\0\1")
    refused(
        directory, r"tokenizer\.model: needs the package sentencepiece .* copy the model's tokenizer\.json beside it"
    )


def test_a_whole_one_is_read(directory: Path) -> None:
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary.items() <= load_tokenizer(directory).get_vocab().items()
