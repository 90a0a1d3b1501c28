"""A command's options: a dataclass, filled from the command line and from the YAML file of `--config`."""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from jora.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command takes."""

    config: str | None = None
    """A YAML file with options by name; what stands on the command line wins."""


OptionsT = TypeVar("OptionsT", bound=CommandOptions)


class _Option(typing.NamedTuple):
    is_bool: bool
    required: bool


def _options_of(cls: type) -> dict[str, _Option]:
    """Field name -> what it takes; nested dataclasses are flattened, as `OmitArgPrefixes` does for tyro."""
    hints = typing.get_type_hints(cls)
    found: dict[str, _Option] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _options_of(typing.cast(type, hint))
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        found[field.name] = _Option(hint is bool, required)
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return match[0] if match else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(argv: Sequence[str]) -> list[str]:
    """The names of the options on a command line, without dashes and values."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and word != "--"]


def _check_names(argv: Sequence[str], known: Mapping[str, _Option], prog: str) -> None:
    flags = set(known) | {f"no_{name}" for name, option in known.items() if option.is_bool}
    for name in _given(argv):
        if name not in flags and name != "help" and not name.startswith("tyro_"):
            nearest = _flag(_nearest(name, known))
            raise InputError(f"{prog}: unknown option {_flag(name)}; the nearest is {nearest}")


def _config_path(argv: Sequence[str]) -> Path | None:
    path = None
    for at, word in enumerate(argv):
        if word == "--config" and at + 1 < len(argv):
            path = argv[at + 1]
        elif word.startswith("--config="):
            path = word.partition("=")[2]
    return None if path is None else Path(path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path}: not a text file in UTF-8 ({error.reason})") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"--config {path}{where}: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: holds a {type(values).__name__}; write one `option: value` a line")
    return values


def _words(name: str, value: Any, option: _Option, path: Path) -> list[str]:
    """One YAML value as command-line words, so that file and command line are read by the same rules."""
    flag = _flag(name)
    if option.is_bool:
        if not isinstance(value, bool):
            raise InputError(f"--config {path}: {name} is true or false, not {value!r}")
        return [flag if value else _flag(f"no_{name}")]
    if isinstance(value, Mapping):
        return [flag, *(str(word) for pair in value.items() for word in pair)]
    if isinstance(value, list):
        return [flag, *(str(word) for word in value)]
    return [f"{flag}={value}"]


def _words_from_file(path: Path, known: Mapping[str, _Option], skip: Iterable[str]) -> list[str]:
    words: list[str] = []
    for key, value in _read_yaml(path).items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            nearest = _nearest(name, known.keys() - {"config"})
            raise InputError(f"--config {path}: unknown option {key!r}; the nearest is {nearest!r}")
        if name not in skip:
            words += _words(name, value, known[name], path)
    return words


def _first_lines(box: str) -> str:
    """The message of tyro's framed error: what stands above its first rule, on one line."""
    kept = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╰╯╭╮ ")
        if not text or not text.strip("─"):
            break
        kept.append(text)
    return re.sub(r"^Error parsing (?!-)\S+: ", "", " ".join(kept))  # a dataclass's own check says it all


def read_options(cls: type[OptionsT], argv: Sequence[str], prog: str) -> OptionsT:
    """The options of one command: defaults, then the file of `--config`, then `argv`.

    Raises:
        InputError: an unknown option, a missing one, or a value of the wrong kind, in either place.
        SystemExit: after `--help`.
    """
    known = _options_of(cls)
    if "--help" in argv or "-h" in argv:
        tyro.cli(cls, prog=prog, args=["--help"])
    _check_names(argv, known, prog)
    path = _config_path(argv)
    given = set(_given(argv))
    given |= {name.removeprefix("no_") for name in given if name.removeprefix("no_") in known}
    from_file = _words_from_file(path, known, given) if path else []
    missing = [name for name, option in known.items() if option.required and name not in given | set(_given(from_file))]
    if missing:
        raise InputError(f"{prog}: {_flag(missing[0])} is missing; `{prog} --help` says what it is")
    return _parse(cls, [*from_file, *argv], prog, path)


def _parse(cls: type[OptionsT], words: Sequence[str], prog: str, path: Path | None) -> OptionsT:
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(cls, prog=prog, args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        where = f" (options are also read from {path})" if path else ""
        raise InputError(f"{prog}: {_first_lines(box.getvalue())}{where}") from None
