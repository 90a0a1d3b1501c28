"""Encoders that the server was started with: loaded and compiled before the first request, and their failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.encoders.tiny_encoders import tiny_encoder
from tests.serve.bases import base, randomised
from tests.serve.engines import Reference, ask, compilations, prompt, run, tokens

import jora
from jora.encoders.encoder import BertEncoder
from jora.errors import InputError
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.engine import Engine

WORDS = tuple(b"w1 w2 w3 " * 8)  # as many tokens as the encoder has positions


@pytest.fixture
def catalogue(shelf: Path, tmp_path: Path) -> Catalogue:
    """ "read" has its prompt from an encoder, "two" has none."""
    encoder = tiny_encoder("bert")[1]
    method = jora.LoPA(prompt_tokens=6, rank=2, hidden=7, encoder=encoder)
    jora.save_adapter(randomised(method, base(), 11, 0.5), tmp_path / "read")
    jora.save_adapter(jora.load_adapter(shelf / "two", base()), tmp_path / "two")
    return Catalogue(tmp_path, base().config, base().identity, encoders=[encoder])


def test_nothing_is_loaded_or_compiled_after_the_start(
    engine_of: Callable[..., Engine], catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, read = [], BertEncoder._read

    def counting(self: BertEncoder) -> Any:
        loaded.append(self.path)
        return read(self)

    monkeypatch.setattr(BertEncoder, "_read", counting)
    encoder = tiny_encoder("bert")[1]
    engine = engine_of(catalogue, encoders=(encoder,))
    engine.warm_up()
    assert loaded == [Path(encoder)]
    with compilations() as compiled:
        events = run(engine, ask("short", prompt(26, 12), "read"), ask("long", WORDS, "read"))
    assert not compiled and loaded == [Path(encoder)]
    assert all(len(tokens(events[name])) == 8 for name in ("short", "long"))


def test_an_encoder_that_is_missing_is_told_at_the_start(
    engine_of: Callable[..., Engine], catalogue: Catalogue
) -> None:
    with pytest.raises(InputError, match="no-encoder"):
        engine_of(catalogue, encoders=("./no-encoder",)).warm_up()


def test_an_encoder_that_fails_ends_its_requests_alone(
    engine_of: Callable[..., Engine], catalogue: Catalogue, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: BertEncoder, *rest: Any) -> Any:
        raise RuntimeError("out of memory\non the device")

    monkeypatch.setattr(BertEncoder, "encode", broken)
    engine = engine_of(catalogue)
    events = run(engine, ask("read", prompt(26, 12), "read", n=2), ask("two", prompt(28, 9), "two"))
    assert [event.finish for event in events["read"]] == ["error", "error"]
    error = events["read"][0].error or ""
    assert "'read'" in error and "RuntimeError" in error and "\n" not in error
    assert tokens(events["two"]) == reference("two", prompt(28, 9))
    monkeypatch.undo()
    assert len(tokens(run(engine, ask("read", prompt(26, 12), "read"))["read"])) == 8
