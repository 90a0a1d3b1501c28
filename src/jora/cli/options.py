"""A command's options: a dataclass, filled from the command line and from the YAML file of `--config`."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Self, TypeVar

import tyro
import yaml

from jora.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What every command takes."""

    config: str | None = None
    """A YAML file with options by name; what stands on the command line wins."""

    @classmethod
    def completed(cls, value_of: Callable[[str], str | None]) -> type[Self]:
        """The class to be read, where a first look at what was given (`value_of` an option) decides about options."""
        return cls

    @classmethod
    def explain(cls, name: str) -> str | None:
        """Why there is no option of this name, where that is known."""
        return None


OptionsT = TypeVar("OptionsT", bound=CommandOptions)


@dataclasses.dataclass(frozen=True)
class _Json(tyro.constructors.PrimitiveConstructorSpec[Any]):
    """A value that words cannot tell: a list of one beside the one itself, or lists by name."""

    kind: type = list
    item: type = str

    def wrong(self, value: Any) -> str | None:
        """What about a value of `kind` does not fit."""
        lists = value if isinstance(value, dict) else {"": value}
        for name, items in lists.items():
            if not isinstance(name, str) or not isinstance(items, list):
                return f"{name!r}: {items!r} is not a list by name"
            for item in items:
                if not isinstance(item, self.item) or isinstance(item, bool):
                    return f"{item!r} is not {_ITEMS.get(self.item, self.item.__name__)}"
        return None


_ITEMS: dict[type, str] = {int: "a whole number", str: "text"}


def _json(kind: type, item: type, metavar: str) -> _Json:
    def read(words: list[str]) -> Any:
        value: Any = json.loads(words[0])  # its error is a ValueError, as tyro wants it
        if not isinstance(value, kind):
            raise ValueError(f"{words[0]!r} is not a JSON {metavar}")
        if wrong := made.wrong(value):
            raise ValueError(wrong)
        return tuple(value) if isinstance(value, list) else value

    # No default is shown in this form: there is always a plainer one.
    made = _Json(1, metavar, read, lambda value: False, lambda value: [str(value)], kind=kind, item=item)
    return made


def json_list(item: type) -> _Json:
    """How a list of such items is read where it stands beside one of them."""
    return _json(list, item, "LIST")


def json_object(item: type) -> _Json:
    """How lists of such items by name are read."""
    return _json(dict, item, "OBJECT")


class _Option(typing.NamedTuple):
    is_bool: bool
    required: bool
    positional: bool
    json: tuple[_Json, ...]  # what may stand as JSON


def _options_of(cls: type) -> dict[str, _Option]:
    """Field name -> what it takes; nested dataclasses are flattened, as `OmitArgPrefixes` does for tyro."""
    hints = typing.get_type_hints(cls)
    marked = typing.get_type_hints(cls, include_extras=True)
    found: dict[str, _Option] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found |= _options_of(typing.cast(type, hint))
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        marks = _marks(marked[field.name])
        as_json = tuple(mark for mark in marks if isinstance(mark, _Json))
        found[field.name] = _Option(hint is bool, required, tyro.conf.Positional in marks, as_json)
    return found


def _marks(hint: Any) -> list[Any]:
    """What annotates a type or the members of a union."""
    own = list(getattr(hint, "__metadata__", ()))
    return own + [mark for inner in typing.get_args(hint) for mark in _marks(inner)]


def nearest(name: str, known: Iterable[str]) -> str:
    """The most similar of some names."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return match[0] if match else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(argv: Sequence[str]) -> list[str]:
    """The names of the options on a command line, without dashes and values."""
    return [word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--") and word != "--"]


def _check_names(cls: type[CommandOptions], argv: Sequence[str], known: Mapping[str, _Option], prog: str) -> None:
    flags = {name for name, option in known.items() if not option.positional}
    flags |= {f"no_{name}" for name, option in known.items() if option.is_bool}
    for name in _given(argv):
        if name not in flags and name != "help" and not name.startswith("tyro_"):
            why = cls.explain(name) or f"the nearest is {_flag(nearest(name, flags))}"
            raise InputError(f"{prog}: unknown option {_flag(name)}; {why}")


def _last_value(argv: Sequence[str], name: str) -> str | None:
    """What follows the last `--name` on a command line."""
    flag, value = _flag(name), None
    for at, word in enumerate(argv):
        if word == flag and at + 1 < len(argv):
            value = argv[at + 1]
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """A YAML file of values by name; `where` begins the line of an error.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file in UTF-8 ({error.reason})") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"{where}{line}: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds a {type(values).__name__}; write one `option: value` a line")
    return values


def _words(name: str, value: Any, option: _Option, where: str) -> list[str]:
    """One YAML value as command-line words, so that file and command line are read by the same rules."""
    flag = _flag(name)
    if option.positional:
        raise InputError(f"{where}: {name} stands on the command line, not in a file")
    if option.is_bool:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {name} is true or false, not {value!r}")
        return [flag if value else _flag(f"no_{name}")]
    for form in option.json:
        if isinstance(value, form.kind):
            if wrong := form.wrong(value):
                raise InputError(f"{where}: {name}: {wrong}")
            return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, Mapping):
        return [flag, *(str(word) for pair in value.items() for word in pair)]
    if isinstance(value, list):
        return [flag, *(str(word) for word in value)]
    return [f"{flag}={value}"]


def _all_words(
    cls: type[CommandOptions],
    values: Mapping[str, Any],
    known: Mapping[str, _Option],
    where: str,
    skip: Iterable[str] = (),
) -> list[str]:
    words: list[str] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            why = cls.explain(name) or f"the nearest is {nearest(name, known.keys() - {'config'})!r}"
            raise InputError(f"{where}: unknown option {key!r}; {why}")
        if name not in skip:
            words += _words(name, value, known[name], where)
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
    if "--help" in argv or "-h" in argv:
        tyro.cli(cls.completed(lambda name: _last_value(argv, name)), prog=prog, args=["--help"])
    config = _last_value(argv, "config")
    path = None if config is None else Path(config).expanduser()
    values = read_yaml(path, f"--config {path}") if path else {}
    cls = cls.completed(lambda name: _last_value(argv, name) or _text(values.get(name)))
    known = _options_of(cls)
    _check_names(cls, argv, known, prog)
    given = set(_given(argv))
    given |= {name.removeprefix("no_") for name in given if name.removeprefix("no_") in known}
    from_file = _all_words(cls, values, known, f"--config {path}", given)
    _check_required(known, given | set(_given(from_file)), prog, f"`{prog} --help` says what it is")
    where = f" (options are also read from {path})" if path else ""
    return _parse(cls, [*from_file, *argv], prog, where)


def read_values(cls: type[OptionsT], values: Mapping[str, Any], where: str) -> OptionsT:
    """The same from values by name, as a YAML file holds them; `where` begins the line of an error.

    Raises:
        InputError: as `read_options`.
    """
    cls = cls.completed(lambda name: _text(values.get(name)))
    known = _options_of(cls)
    words = _all_words(cls, values, known, where)
    _check_required(known, set(_given(words)), where, "add it")
    return _parse(cls, words, where)


def option_names(cls: type) -> list[str]:
    """The names of a dataclass's options, nested ones included."""
    return list(_options_of(cls))


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _check_required(known: Mapping[str, _Option], given: set[str], where: str, remedy: str) -> None:
    for name, option in known.items():
        if option.required and not option.positional and name not in given:
            raise InputError(f"{where}: {_flag(name)} is missing; {remedy}")


def _parse(cls: type[OptionsT], words: Sequence[str], prog: str, where: str = "") -> OptionsT:
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(cls, prog=prog, args=words)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(f"{prog}: {_first_lines(box.getvalue())}{where}") from None
