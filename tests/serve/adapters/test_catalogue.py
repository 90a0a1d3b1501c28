"""Names, versions and confinement of the served directory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.serve.adapters.shelf import base, save

import jora
from jora.errors import InputError
from jora.serve.adapters.catalogue import Catalogue
from jora.serve.requests import UnknownAdapter


@pytest.fixture
def served(tmp_path: Path) -> Path:
    save(tmp_path / "served" / "a")
    return tmp_path / "served"


def catalogue(directory: Path | None, *also: Path) -> Catalogue:
    return Catalogue(directory, base().config, base().identity, also)


def test_every_adapter_below_the_directory_is_served_under_its_relative_name(served: Path) -> None:
    shutil.copytree(served / "a", served / "team" / "b")
    shutil.copytree(served / "a", served / "1" / "2" / "3" / "too-deep")
    shutil.copytree(served / "a", served / ".hidden")
    (served / "empty").mkdir()
    (served / "a" / "inner").mkdir()
    assert catalogue(served).names() == ["a", "team/b"]


def test_an_adapter_that_arrives_later_is_found(served: Path) -> None:
    found = catalogue(served)
    with pytest.raises(UnknownAdapter, match="late"):
        found.resolve("late")
    shutil.copytree(served / "a", served / "late")
    assert found.resolve("late").name == "late"
    shutil.rmtree(served / "late")
    with pytest.raises(UnknownAdapter, match="late"):
        found.resolve("late")
    assert [version.name for version in found.take_retired()] == ["late"]


def test_changed_files_are_a_new_version_and_the_old_one_is_retired(served: Path) -> None:
    found = catalogue(served)
    first = found.resolve("a")
    assert found.resolve("a") == first
    save(served / "a", seed=1)
    second = found.resolve("a")
    assert second.version > first.version
    assert found.take_retired() == [first]
    assert found.take_retired() == []


def test_loading_again_is_a_new_version_that_counts_only_once_committed(served: Path) -> None:
    found = catalogue(served)
    first = found.resolve("a")
    entry = found.candidate("a", str(served / "a"))
    assert found.resolve("a") == first
    assert found.commit(entry) == found.resolve("a") != first


def test_an_unloaded_name_stays_unknown_until_it_is_loaded_again(served: Path) -> None:
    found = catalogue(served)
    version = found.resolve("a")
    found.unload("a")
    assert found.names() == [] and found.take_retired() == [version]
    with pytest.raises(UnknownAdapter, match="load it again"):
        found.resolve("a")
    with pytest.raises(UnknownAdapter):
        found.unload("a")
    again = found.commit(found.candidate("a", "a"))
    assert found.resolve("a") == again and again.version > version.version


def test_a_name_may_stand_for_any_directory_within_the_configured_ones(served: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "b")
    with pytest.raises(InputError, match="outside"):
        catalogue(served).candidate("b", str(tmp_path / "elsewhere" / "b"))
    found = catalogue(served, tmp_path / "elsewhere")
    found.commit(found.candidate("my-b", str(tmp_path / "elsewhere" / "b")))
    assert found.names() == ["a", "my-b"]
    found.unload("my-b")
    assert found.names() == ["a"]


@pytest.mark.parametrize(
    "name", ["..", "../served/a", "a/..", "/etc", "", "a//b", "a/", ".a", "a\0", "a\nb", "a\\b", "x" * 256, "a/b/c/d"]
)
def test_a_name_that_is_no_relative_path_is_refused(served: Path, name: str) -> None:
    with pytest.raises(InputError, match="adapter name"):
        catalogue(served).resolve(name)
    with pytest.raises(InputError, match="adapter name"):
        catalogue(served).candidate(name, str(served / "a"))


@pytest.mark.parametrize("path", ["..", "../other/a", "/etc", "a\0b", "missing"])
def test_a_path_out_of_the_directory_is_refused(served: Path, tmp_path: Path, path: str) -> None:
    save(tmp_path / "other" / "a")
    with pytest.raises(InputError, match=r"outside|no such"):
        catalogue(served).candidate("x", path)


def test_links_out_of_the_directory_are_not_followed(served: Path, tmp_path: Path) -> None:
    save(tmp_path / "other")
    (served / "out").symlink_to(tmp_path / "other")
    (served / "within").symlink_to(served / "a")
    shutil.copytree(served / "a", served / "file-out")
    (served / "file-out" / "jora.json").unlink()
    (served / "file-out" / "jora.json").symlink_to(tmp_path / "other" / "jora.json")
    found = catalogue(served)
    assert "out" not in found.names() and "within" in found.names()
    assert found.resolve("within").name == "within"
    for name in ("out", "file-out"):
        with pytest.raises(InputError, match="outside"):
            found.resolve(name)


def test_a_pipe_in_place_of_a_file_is_refused_and_not_opened(served: Path) -> None:
    (served / "a" / "jora.json").unlink()
    os.mkfifo(served / "a" / "jora.json")
    with pytest.raises(InputError, match="no regular file"):
        catalogue(served).resolve("a")


def test_info_tells_method_rank_and_targets_without_weights(served: Path) -> None:
    save(served / "dora", jora.DoRA(rank=3, targets=["v_proj", "up_proj"]))
    save(served / "nola", jora.NOLA(rank=4, bases=8, targets=["q_proj"]))
    save(served / "soft", jora.PromptTuning(prompt_tokens=5))
    found = catalogue(served)
    for name in ("dora", "nola", "soft", "a"):
        (served / name / "adapter_model.safetensors").write_bytes(b"not read")
    told = {info.name: (info.method, info.rank, info.targets, info.prefix_slots) for info in found.infos()}
    assert told == {
        "a": ("lora", 2, ("q_proj",), 0),
        "dora": ("dora", 3, ("v_proj", "up_proj"), 0),
        "nola": ("nola", 4, ("q_proj",), 0),
        "soft": ("prompt-tuning", None, (), 5),
    }
    assert {info.base for info in found.infos()} == {base().identity["name"]}


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        catalogue(tmp_path / "missing")


@pytest.mark.parametrize("call", ["lstat", "open"])
def test_what_cannot_be_read_is_refused_by_itself(served: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(served / "b")
    real = getattr(Path, call)

    def shut(path: Path, *args: Any, **options: Any) -> Any:  # by hand: root may read everything
        if path.parent.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, call, shut)
    told: list[str] = []
    found = catalogue(served)
    assert [info.name for info in found.infos(lambda name, error: told.append(str(error)))] == ["a"]
    [line] = told
    assert "adapter 'b'" in line and "cannot be read (Permission denied)" in line and str(served) not in line


def test_what_goes_while_it_is_looked_at_is_passed_over(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(served / "a", served / "team" / "b")
    (served / "loop").symlink_to("loop")
    found, listdir = catalogue(served), os.listdir
    assert found.names() == ["a", "team/b"]

    def late(path: str) -> list[str]:
        names = listdir(path)
        if path.endswith("team"):
            shutil.rmtree(path)
        return names

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", late)
        assert found.names() == ["a"]
    version = found.resolve("a")
    shutil.rmtree(served)
    assert found.names() == [] and found.infos() == []
    with pytest.raises(InputError):
        found.info(version)


def test_a_directory_that_cannot_be_read_is_refused(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(InputError, match="cannot be read"):
        patched.setattr(os, "access", lambda path, mode: False)
        catalogue(served)


def test_a_name_that_is_too_long_for_a_file_is_unknown(served: Path) -> None:
    found = catalogue(served)
    with pytest.raises(UnknownAdapter):
        found.resolve("é" * 200)  # 400 bytes
    with pytest.raises(UnknownAdapter):
        found.unload("é" * 200)
    with pytest.raises(InputError, match="no such"):
        found.candidate("x", "é" * 200)


def test_a_sibling_whose_name_begins_alike_is_outside(served: Path, tmp_path: Path) -> None:
    save(tmp_path / "served-too" / "a")
    (served / "link").symlink_to(tmp_path / "served-too" / "a")
    found = catalogue(served)
    with pytest.raises(InputError, match="outside"):
        found.candidate("x", "../served-too/a")
    with pytest.raises(InputError, match="outside"):
        found.resolve("link")


def test_files_written_in_place_are_a_new_version(served: Path) -> None:
    found = catalogue(served)
    first, weights = found.resolve("a"), served / "a" / "adapter_model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(bytes(4))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert found.resolve("a") != first
