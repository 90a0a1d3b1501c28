"""What is checked of an adapter's files before anything reads them: names, paths, sizes, headers, options.

The files may come from anyone. Nothing is unpickled, nothing outside the configured directories is opened, and no
number in a file makes the server allocate or compute without a bound. What concerns the weights themselves (shapes,
NaN, unknown tensors) is checked by `jora.load_adapter`, what concerns serving by `loading.Loader`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from jora.errors import InputError
from jora.methods.storage import OWN_CONFIG, PEFT_CONFIG, WEIGHTS

FILES = (PEFT_CONFIG, OWN_CONFIG, WEIGHTS)
MAX_PARTS, MAX_NAME = 3, 255  # of a name: directories below the served one, characters
MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 16  # of objects and lists in a config
MAX_HEADER_BYTES = 16 << 20
MAX_PATTERNS = 1000  # of rank_pattern and alpha_pattern: each is compared with each module
MAX_PATTERN, MAX_QUANTIFIERS = 2000, 5  # characters, and the repeats that may backtrack, of a regular expression
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SIDES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "targets")


class FileState(NamedTuple):
    """A file as it was: another one, or a changed one, differs in one of these."""

    name: str
    inode: int
    size: int  # bytes
    modified: int  # ns


Fingerprint = tuple[FileState, ...]


def check_name(name: str) -> None:
    """Raise InputError for what can be no adapter's name: it is a path below the served directory, and no other."""
    parts = name.split("/")
    if len(name) > MAX_NAME or len(parts) > MAX_PARTS:
        raise InputError(f"adapter name {name[:40]!r}...: longer than {MAX_NAME} characters or {MAX_PARTS} directories")
    if any(not part or part.startswith(".") or "\\" in part or not part.isprintable() for part in parts):
        raise InputError(
            f"adapter name {name!r}: may have no empty part, no part that begins with a dot, no backslash and no"
            " control character"
        )


def confined(path: Path, roots: tuple[Path, ...], where: str) -> Path:
    """The real path of `path`, if it lies in one of the roots (themselves real), links followed; else InputError."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # a NUL
        raise InputError(f"{where}: no such file or directory") from None
    # First, so that the answer tells nobody what exists elsewhere.
    if not any(real.is_relative_to(root) for root in roots):
        raise InputError(f"{where}: lies outside the directories that adapters are served from")
    if not os.path.exists(real):
        raise InputError(f"{where}: no such file or directory")
    return real


def name_within(directory: Path, path: str) -> str | None:
    """The name below the served directory of what a path leads to, links followed; None for what lies elsewhere.

    A relative path is below the directory, as `Catalogue.candidate` takes it.
    """
    root = os.path.realpath(directory)
    try:
        real = Path(os.path.realpath(directory / path))
    except ValueError:  # a NUL
        return None
    return real.relative_to(root).as_posix() if real.is_relative_to(root) else None


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Raises InputError for a file that cannot be read, or no longer: it is its own adapter's trouble alone."""
    try:
        yield
    except OSError as error:
        # Not the error's text: it names the server's paths, and clients read this.
        raise InputError(f"{where}: cannot be read ({error.strerror or type(error).__name__})") from error


def fingerprint(directory: Path, roots: tuple[Path, ...], where: str) -> Fingerprint | None:
    """The adapter files of a directory; None where it holds no adapter.

    Raises InputError for a file that cannot be read, is none or leads elsewhere, and for weights in pickled form alone.
    """
    with readable(where):
        return _fingerprint(directory, roots, where)


def _fingerprint(directory: Path, roots: tuple[Path, ...], where: str) -> Fingerprint | None:
    found = []
    for name in FILES:
        path = directory / name
        try:
            state = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISLNK(state.st_mode):
            state = confined(path, roots, f"{where}/{name}").stat()
        if not stat.S_ISREG(state.st_mode):
            raise InputError(f"{where}/{name}: is no regular file")
        found.append(FileState(name, state.st_ino, state.st_size, state.st_mtime_ns))
    names = {file.name for file in found}
    if not names & {PEFT_CONFIG, OWN_CONFIG}:
        return None
    if WEIGHTS not in names:
        if any(directory.glob("*.bin")):
            raise InputError(f"{where}: only pickled weights (.bin), which Jora does not read; save as {WEIGHTS}")
        return None
    return tuple(found)


def read_config(path: Path, where: str) -> dict[str, Any]:
    """A JSON object of bounded size and depth whose numbers are finite."""
    with readable(where), path.open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"{where}: larger than {MAX_CONFIG_BYTES >> 20} MiB, which no adapter's config is")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise InputError(f"{where}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    for depth, item in _walk(value):
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: nested more than {MAX_DEPTH} deep")
        if isinstance(item, float) and not math.isfinite(item):
            raise InputError(f"{where}: holds a number that is not finite")
    _check_patterns(value, where)
    options = value.get("options")
    if isinstance(options, dict):
        _check_patterns(options, where)
    return value


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    waiting = [(0, value)]
    while waiting:
        depth, item = waiting.pop()
        yield depth, item
        if depth <= MAX_DEPTH and isinstance(item, dict | list):
            waiting += ((depth + 1, each) for each in (item.values() if isinstance(item, dict) else item))


def _check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Regular expressions that can take exponential time are refused: a match holds up every thread."""
    patterns = {option: [value] for option in _SIDES if isinstance(value := config.get(option), str)}
    for option in ("rank_pattern", "alpha_pattern"):
        if isinstance(value := config.get(option), dict):
            patterns[option] = list(value)
    for option, chosen in patterns.items():
        if len(chosen) > MAX_PATTERNS:
            raise InputError(f"{where}: {option} has {len(chosen)} patterns; at most {MAX_PATTERNS} are served")
        for pattern in chosen:
            repeats = sum(pattern.count(sign) for sign in "*+{")
            grouped = any(f"){sign}" in pattern for sign in "*+{")
            if len(pattern) > MAX_PATTERN or repeats > MAX_QUANTIFIERS or grouped:
                raise InputError(
                    f"{where}: {option} {pattern[:60]!r} is a regular expression that may take very long"
                    f" (a repeated group, or more than {MAX_QUANTIFIERS} repeats); list the modules by name"
                )


def check_weights(path: Path, most_bytes: int, where: str) -> None:
    """Check the header of a safetensors file (see `models.safetensors_file`) without reading its tensors.

    Every tensor has a known dtype, its bytes fit its shape, and the tensors fill the file without gap or overlap.
    """
    with readable(where), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise InputError(f"{where}: {size} bytes, more than an adapter of this server can have ({most_bytes})")
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{where}: not a whole safetensors file (a header of {length} bytes in {size})")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: its header is no safetensors header ({reason[:100]})") from None
    at = 0
    for start, stop, name in spans:
        if start != at:
            raise InputError(f"{where}: tensor {name[:100]!r} begins at byte {start}, the one before ends at {at}")
        at = stop
    if at != size - 8 - length:
        raise InputError(f"{where}: its tensors take {at} bytes, the file has {size - 8 - length}; save it again")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int, str]:
    start, stop = entry["data_offsets"]
    shape, dtype = entry["shape"], entry["dtype"]
    if dtype not in _SIZES:
        raise ValueError(f"{name[:60]!r} is of dtype {str(dtype)[:20]}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name[:60]!r} has a size or an offset that is none")
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name[:60]!r} has other bytes than its shape")
    return start, stop, name


def check_base(recorded: Mapping[str, Any], named: str, identity: Mapping[str, str], where: str) -> str | None:
    """Whether the adapter is for this base. Returns a line to show where only the names differ.

    A fingerprint is of the weights, so another one is another model and is refused; training only warns there. A name
    is where someone had the model: the same weights have many, so another one says little.
    """
    served = PurePath(identity["name"]).name  # not where it lies: clients read this
    theirs, ours = recorded.get("fingerprint"), identity.get("fingerprint")
    if theirs and ours:
        if theirs != ours:
            raise InputError(
                f"{where}: trained on another base ({named!r}, fingerprint {str(theirs)[:12]}), this server has"
                f" {served!r} ({ours[:12]})"
            )
        return None
    if named and PurePath(named).name != served:
        return f"made for base {named!r}, served on {served!r}; it records no fingerprint to tell"
    return None
