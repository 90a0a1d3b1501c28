"""Files and directories that take their place whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from jora.errors import InputError
from jora.files import atomic_directory, atomic_write


def fill(path: str | Path, text: str) -> None:
    with atomic_directory(path) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / text).write_text(text)


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_is_replaced(tmp_path: Path, there: bool) -> None:
    if there:
        fill(tmp_path / "out", "old")
    fill(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out" / "sub").iterdir()] == ["new"]


@pytest.mark.parametrize("name", [".", "../here", "below/.."])
def test_the_current_directory_stays_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if name == "below/..":
        Path("below").mkdir()
    fill(name, "old")
    fill(name, "new")
    assert [str(path) for path in Path(".").rglob("*")] == ["sub", "sub/new"]  # where the user's shell is
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_where_a_link_leads_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    fill(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "sub" / "new").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(".", "old")
    with pytest.raises(KeyError), atomic_directory("."):
        raise KeyError
    assert [str(path) for path in tmp_path.rglob("*")] == [
        str(tmp_path / path) for path in ("here", "here/sub", "here/sub/old")
    ]


@pytest.mark.parametrize("name", [".", "..", "out"])
def test_a_directory_is_not_replaced_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is a directory: give a file"), atomic_write(name):
        pytest.fail("the work was begun")
