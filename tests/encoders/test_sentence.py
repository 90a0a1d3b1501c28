"""Encoders through sentence-transformers, by a stand-in for the package, which brings torch and is an extra."""

from __future__ import annotations

import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.encoders.tiny_encoders import tiny_encoder

from jora.encoders import open_encoder
from jora.errors import InputError


@pytest.fixture
def directory(tmp_path: Path) -> str:
    """modules.json is what makes a directory one of sentence-transformers."""
    shutil.copytree(tiny_encoder("bert")[1], tmp_path / "sentences")
    (tmp_path / "sentences" / "modules.json").write_text("[]")
    return str(tmp_path / "sentences")


class StandIn:
    """Vectors of five elements: how often each letter of "abcde" occurs."""

    def __init__(self, path: str) -> None:
        assert Path(path, "modules.json").is_file()

    def encode(self, texts: list[str], *, show_progress_bar: bool) -> np.ndarray:
        assert not show_progress_bar
        return np.array([[text.count(letter) for letter in "abcde"] for text in texts], np.float64)


def test_it_computes_the_vectors(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = StandIn
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    encoder = open_encoder(directory)
    assert encoder.width == 5
    found = encoder.encode(["abba", "e"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[2, 2, 0, 0, 0], [0, 0, 0, 0, 1]])
    beside = open_encoder(tiny_encoder("bert")[1])
    assert encoder.fingerprint == beside.fingerprint and encoder.nbytes == beside.nbytes > 0
    kept = open_encoder(directory, keep=True)
    kept.warm_up()
    package.SentenceTransformer = None  # it is loaded
    np.testing.assert_array_equal(kept.encode(["e"]), found[1:])


def test_without_the_extra_one_line_says_what_to_install(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"jora\[dense\]") as caught:
        open_encoder(directory).encode(["a"])
    assert "\n" not in str(caught.value)
