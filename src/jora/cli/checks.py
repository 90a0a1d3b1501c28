"""Checks of paths and counts before a model is loaded, which may take minutes. Each raises InputError."""

from __future__ import annotations

import os
from pathlib import Path

from jora.cli.options import CommandOptions
from jora.errors import InputError


def check_names(model: str, adapter: str | None) -> None:
    """Model and adapter exist. An adapter on the hub is fetched; of a model there, nothing is known yet."""
    from jora.methods.storage import locate_adapter
    from jora.models.model import resolve

    if model.count("/") != 1 or model.startswith((".", "/", "~")):  # no hub id
        resolve(model)
    if adapter is not None:
        try:
            locate_adapter(adapter)
        except InputError as error:
            raise InputError(f"--adapter {error}") from error


def check_file(option: str, path: str) -> None:
    """The file that an option names exists."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"{option} {path} is a directory: give a file")
    if not file.exists():
        raise InputError(f"{option} {path}: no such file")


def check_there(option: str, path: str, *, directory: bool = False) -> None:
    """What an option names exists: a directory, or a file as well."""
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(f"{option} {path}: no such directory{'' if directory else ' or file'}")
    if directory and not place.is_dir():
        raise InputError(f"{option} {path} is a file: give a directory")


def check_at_least_one(options: CommandOptions, *names: str) -> None:
    """Options that count something, where they are given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")


def check_out_file(out: str | None) -> None:
    """A file can be written at --out."""
    if out is None:
        return
    if Path(out).expanduser().is_dir():
        raise InputError(f"--out {out} is a directory: give a file")
    check_parent(out)


def check_parent(out: str) -> None:
    """--out can be made where it is to stand; directories on the way are made when it is written."""
    parent = next(p for p in Path(out).expanduser().absolute().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"--out {out}: {parent} is a file; give a path below a directory")
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: {parent} cannot be written to; give another path")


def check_new_model(out: str, model: str) -> None:
    """--out is new or empty: nothing in a model directory tells whether it is the only copy of its weights."""
    directory = Path(out).expanduser()
    if directory.is_file():
        raise InputError(f"--out {out} is a file: give a directory")
    if directory.exists() and directory.resolve() == Path(model).expanduser().resolve():
        raise InputError(f"--out {out} is the --model directory: give another directory")
    if (directory / "config.json").exists():
        raise InputError(f"--out {out} holds a model already: give another directory or delete it first")
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"--out {out} holds other files: give a new or empty directory")
    check_parent(out)
