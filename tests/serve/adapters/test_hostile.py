"""Adapters that are broken, malicious or for another base are refused in one line, before anything is allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.serve.adapters.shelf import LIMITS, base, load_named, pool_layout, save, shelf

import jora
from jora.errors import InputError
from jora.models.model import Model
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.adapters.loading import Limits, Loaded, Loader

WEIGHTS, PEFT, OWN = "adapter_model.safetensors", "adapter_config.json", "jora.json"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    save(directory / "lora")
    save(directory / "nola", jora.NOLA(rank=2, bases=8, targets=["q_proj"]))
    return directory


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good / "lora", tmp_path / "x")
    return tmp_path / "x"


def load(directory: Path, limits: Limits = LIMITS, model: Model | None = None) -> Loaded:
    model = model or base()
    catalogue = Catalogue(directory.parent, model.config, model.identity)
    loader = Loader(catalogue, model, pool_layout(model), limits)
    version = catalogue.resolve(directory.name)
    return loader.expand(loader.load(version), version)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def header(change: Callable[[dict[str, Any]], Any], tail: bytes = b"") -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        whole = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        entries = json.loads(whole[8 : 8 + length])
        text = change(entries)
        text = text if isinstance(text, bytes) else json.dumps(entries).encode()
        (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :] + tail)

    return apply


def raw(data: bytes) -> Callable[[Path], None]:
    return lambda directory: void((directory / WEIGHTS).write_bytes(data))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / PEFT, **changes)


def own(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / OWN, **changes)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: void((directory / name).write_text(content))


def void(_: object) -> None:
    return None


def truncated(directory: Path) -> None:
    whole = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(whole[: len(whole) - 10])


def only_pickled(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (weights(lambda t: t[A].fill(np.nan)), "NaN"),
    "one infinity": (weights(lambda t: t[A].__setitem__((0, 0), np.inf)), "NaN or infinity"),
    "overflow with its scale": (weights(lambda t: t[A.replace("_A", "_B")].fill(3e38)), "not finite|beyond"),
    "shape": (weights(lambda t: t.__setitem__(A, t[A][:1])), "shape"),
    "missing tensor": (weights(lambda t: t.pop(A)), "lacks"),
    "unknown tensor": (weights(lambda t: t.__setitem__("../../evil", t[A])), "not one that its config"),
    "truncated": (truncated, "tensors take"),
    "empty file": (raw(b""), "not a whole safetensors"),
    "pickle under the name": (raw(b"\x80\x04K\x01."), "not a whole safetensors"),
    "header longer than the file": (raw((1 << 62).to_bytes(8, "little") + b"{}"), "header of"),
    "header that is no JSON": (header(lambda _: b"{" * 100_000), "no safetensors header"),
    "header that is a list": (header(lambda _: b"[1]"), "no safetensors header"),
    "offsets beyond the file": (header(lambda h: h[A].update(data_offsets=[0, 1 << 40])), "other bytes than"),
    "negative offset": (header(lambda h: h[A].update(data_offsets=[-256, 0])), "an offset that is none"),
    "overlap": (header(lambda h: h[A].update(h[A.replace("layers.0", "layers.1")])), "begins at byte"),
    "a name twice": (header(lambda h: json.dumps(h).replace("layers.1", "layers.0").encode()), "twice"),
    "unknown dtype": (header(lambda h: h[A].update(dtype="F8_E4M3")), "F8_E4M3"),
    "bytes behind the tensors": (header(lambda h: None, b"more"), "tensors take"),
    "pickled only": (only_pickled, "pickled"),
    "huge config": (text(PEFT, " " * (2 << 20) + "{}"), "larger than"),
    "deep config": (text(PEFT, '{"a":' * 100 + "1" + "}" * 100), "nested"),
    "very deep config": (text(PEFT, "[" * 100_000), "nested too deeply|not valid JSON"),
    "config that is no JSON": (text(PEFT, "{"), "not valid JSON"),
    "infinite alpha": (text(PEFT, '{"peft_type": "LORA", "lora_alpha": 1e999}'), "not finite"),
    "endless digits": (text(PEFT, '{"r": ' + "9" * 10_000 + "}"), "not valid JSON"),
    "exponential pattern": (config(target_modules=r"(.|.)*y"), "may take very long"),
    "exponential rank pattern": (config(rank_pattern={"(a+)+b": 2}), "may take very long"),
    "too many patterns": (config(rank_pattern={f"x{i}": 2 for i in range(2000)}), "patterns"),
    "options of a wrong kind": (config(target_modules=[["q_proj"]]), "PEFT does not write"),
    "unknown type": (config(peft_type="EVIL"), "EVIL"),
    "rank above the buckets": (config(r=10**9), "rank_buckets"),
    "negative rank": (config(r=-1), "rank"),
    "embeddings": (config(target_modules=["embed_tokens", "q_proj"]), "embed_tokens"),
    "saved modules": (config(modules_to_save=["lm_head"]), "cannot be served"),
    "another base": (own(base={"name": "other", "fingerprint": "0" * 64}), "another base"),
    "a base of a wrong kind": (own(base=["x"]), "no name and fingerprint"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_adapter_is_refused_in_one_line(adapter: Path, case: str) -> None:
    spoil, message = HOSTILE[case]
    spoil(adapter)
    with pytest.raises(InputError, match=message) as refused:
        load(adapter)
    told = str(refused.value)
    assert "\n" not in told and len(told) < 500
    assert "'x'" in told and str(adapter) not in told  # names the adapter; the server's paths are not the client's


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "memory": ({"bases": 10**10}, "its options ask for"),
    "unknown option": ({"evil": 1}, "another version"),
    "kind": ({"rank": "2"}, "another version|kind"),
    "unhashable": ({"targets": [["q_proj"]]}, "is not a module's name"),
    "a list for a number": ({"alpha": [1]}, "kind"),
    "other bases": ({"basis_version": 99}, "version 99"),
    "repeated group": ({"targets": "(q)+_proj"}, "may take very long"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options_of_joras_own_format_are_refused(good: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(good / "nola", tmp_path / "x")
    changes, message = OPTIONS[case]
    options = json.loads((tmp_path / "x" / OWN).read_text())["options"]
    edit(tmp_path / "x" / OWN, options=options | changes)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "x")


def test_another_name_of_the_base_is_accepted_with_a_warning(adapter: Path) -> None:
    (adapter / OWN).unlink()
    edit(adapter / PEFT, base_model_name_or_path="someone/else")
    assert load(adapter).pages > 0
    found = Catalogue(adapter.parent, base().config, base().identity)
    warning = found.info(found.resolve("x")).warning
    assert warning is not None and "someone/else" in warning


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (LIMITS.__class__(("k_proj",), 16, 3, 8, 200), "q_proj"),
        (LIMITS.__class__(("q_proj",), 1, 3, 8, 200), "rank 2"),
        (LIMITS.__class__(("q_proj",), 16, 3, 8, 0), "pages"),
    ],
)
def test_what_the_server_was_not_started_for_is_refused(adapter: Path, limits: Limits, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(adapter, limits)


def test_a_file_too_large_for_the_pool_is_not_read(adapter: Path) -> None:
    with (adapter / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 34)  # takes no disk
    with pytest.raises(InputError, match="more than an adapter of this server"):
        load(adapter)


def test_what_was_refused_leaves_the_old_version_in_service(adapter: Path) -> None:
    with shelf(adapter.parent) as parts:
        before = parts.catalogue.resolve("x")
        shutil.copytree(adapter, adapter.parent / "y")
        HOSTILE["NaN"][0](adapter.parent / "y")
        with pytest.raises(InputError, match="NaN"):
            load_named(parts, "x", "y")
        assert parts.catalogue.resolve("x") == before
        assert parts.host.nbytes == 0 and parts.pages.free_count == parts.pages.total - 1
        shutil.rmtree(adapter.parent / "y")
        save(adapter.parent / "y", seed=3)
        after = load_named(parts, "x", "y")
        assert after == parts.catalogue.resolve("x") != before
