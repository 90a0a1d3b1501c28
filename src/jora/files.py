"""Writing files so that a crash leaves the old one whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from jora.errors import InputError


def beside(path: Path, ending: str, process: int | None = None) -> Path:
    """The temporary path of a process (this one) beside `path`."""
    return path.with_name(f".{path.name}.{process or os.getpid()}.{ending}")


def check_no_directory(path: str | os.PathLike[str]) -> None:
    """Raise InputError where a directory stands in a file's place."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a directory: give a file")


def check_holds_only(directory: Path, names: Collection[str], what: str) -> None:
    """Raise InputError where replacing `directory` would remove a file, or anything but `what`, made of `names`."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file: give a directory")
    if directory.is_dir() and (others := {path.name for path in directory.iterdir()} - set(names)):
        raise InputError(f"{directory} holds {min(others)}, which is no part of {what}: give another")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends without error.

    The rename is atomic on one file system, so a reader sees the old file or the new one, never a part.
    Raises InputError where `path` is a directory.
    """
    check_no_directory(path)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target, "tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of `path` when the block ends without error.

    An existing directory is moved aside first and removed last: at no time is a half-written
    directory found under `path`. Of the current directory the contents take the place, one by one.
    """
    target = Path(path).resolve()  # "." and ".." have no name that another could stand beside
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, retired = beside(target, "tmp"), beside(target, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _replace(target, temporary, retired)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(target: Path, new: Path, retired: Path) -> None:
    if not target.exists():
        os.replace(new, target)
    elif target.samefile(os.curdir):
        # Renamed, it would go from under this process and the user's shell, which would then see nothing in it.
        retired.mkdir()
        for source, destination in ((target, retired), (new, target)):
            for entry in list(source.iterdir()):
                os.replace(entry, destination / entry.name)
    else:
        os.replace(target, retired)
        os.replace(new, target)
