"""Which adapters are served, under which names, and in which version.

Every adapter below the served directory has its path there as its name; others are named when they are loaded. The
directory may grow and change while the server runs: a name is looked up when it is asked for, and files that differ
(inode, size or time) from those of the last request make a new version. So write an adapter elsewhere and rename it
into place, as `jora.save_adapter` does; half-written files are refused until they are whole.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jora.errors import InputError
from jora.methods.storage import OWN_CONFIG, PEFT_CONFIG, WEIGHTS
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.serve.adapters.describe import AdapterInfo, Entry, describe
from jora.serve.adapters.validation import MAX_PARTS, Fingerprint, check_name, confined, fingerprint
from jora.serve.requests import UnknownAdapter
from jora.serve.scheduling.sequence import AdapterVersion


class Catalogue:
    """Names and versions; safe to use from several threads.

    directory: what is served by name, None for nothing. also: further directories that `candidate` may read from.
    config and identity are the base's. encoders: paths and hub ids that adapters may name as the encoder of their
    prompts. A version that its name no longer stands for stays known until `forget`.
    """

    def __init__(
        self,
        directory: Path | None,
        config: ModelConfig,
        identity: Mapping[str, str],
        also: Sequence[Path] = (),
        encoders: Sequence[str] = (),
    ):
        roots = [directory, *also] if directory is not None else list(also)
        if missing := [root for root in roots if not os.path.isdir(root)]:
            raise InputError(f"{missing[0]}: no such directory; make it, or name the one that holds the adapters")
        if shut := [root for root in roots if not os.access(root, os.R_OK | os.X_OK)]:
            raise InputError(f"{shut[0]}: this directory cannot be read; give the server's user the rights to it")
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)
        self._directory = self._roots[0] if directory is not None else None
        self._config, self._identity, self._encoders = config, identity, tuple(encoders)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)  # of all names: a name that comes back never gets an old number
        self._entries: dict[AdapterVersion, Entry] = {}
        self._current: dict[str, AdapterVersion] = {}
        self._loaded: set[str] = set()  # names that were loaded from a path; what is found under them is theirs
        self._withdrawn: set[str] = set()  # unloaded names of the directory
        self._retired: list[AdapterVersion] = []
        self._infos: dict[AdapterVersion, AdapterInfo] = {}

    @classmethod
    def of(cls, adapters: str | os.PathLike[str] | Catalogue | None, model: Model) -> Catalogue:
        """A catalogue as it is, or one of a directory for this base."""
        if isinstance(adapters, Catalogue):
            return adapters
        directory = None if adapters is None else Path(adapters).expanduser()
        return cls(directory, model.config, model.identity)

    def resolve(self, name: str) -> AdapterVersion:
        """The version that a request for this name runs with: a few file stats.

        Raises UnknownAdapter, and InputError where what is there cannot be served.
        """
        check_name(name)
        with self._lock:
            if name in self._loaded:
                known = self._entries[self._current[name]]
                files = fingerprint(known.path, self._roots, known.where)
                if files is None:
                    self._retire(name)
                    raise UnknownAdapter(f"adapter {name!r}: its files have gone")
                return self._noticed(Entry(known.version, known.path, files))
            return self._noticed(self._found(name))

    def _found(self, name: str) -> Entry:
        """What stands in the served directory under a name."""
        where = f"adapter {name!r}"
        path = None if self._directory is None else self._directory / name
        if path is None or not os.path.isdir(path):  # not Path.is_dir, which raises for a name that is too long
            self._withdrawn.discard(name)
            if name in self._current:
                self._retire(name)
            raise UnknownAdapter(f"{where} is not served here")
        if name in self._withdrawn:
            raise UnknownAdapter(f"{where} was unloaded; load it again to serve it")
        real = confined(path, self._roots, where)
        files = fingerprint(real, self._roots, where)
        if files is None:
            raise UnknownAdapter(f"{where}: its directory holds no whole adapter")
        return Entry(AdapterVersion(name, 0), real, files)

    def _noticed(self, found: Entry) -> AdapterVersion:
        """The current version, or a new one where the files are others."""
        version = self._current.get(found.version.name)
        if version is not None:
            known = self._entries[version]
            if (known.path, known.files) == (found.path, found.files):
                return version
        entry = self._numbered(found)
        self._serve(entry, loaded=found.version.name in self._loaded)
        return entry.version

    def candidate(self, name: str, path: str | os.PathLike[str]) -> Entry:
        """A new version of `name` from any directory within the configured ones; not yet served (`commit`).

        A relative path is below the served directory. Raises InputError.
        """
        check_name(name)
        where = f"adapter {name!r}"
        given = Path(path)
        if self._directory is not None:
            given = self._directory / given
        elif not given.is_absolute():
            raise InputError(f"{where}: give an absolute path")
        real = confined(given, self._roots, where)
        if not os.path.isdir(real):
            raise InputError(f"{where}: its path is no directory")
        files = fingerprint(real, self._roots, where)
        if files is None:
            raise InputError(f"{where}: no {PEFT_CONFIG} or {OWN_CONFIG} with {WEIGHTS} there")
        with self._lock:
            return self._numbered(Entry(AdapterVersion(name, 0), real, files))

    def _numbered(self, found: Entry) -> Entry:
        entry = Entry(AdapterVersion(found.version.name, next(self._numbers)), found.path, found.files)
        self._entries[entry.version] = entry
        return entry

    def commit(self, entry: Entry) -> AdapterVersion:
        """Let the name stand for this version from now on; the one before is retired."""
        with self._lock:
            self._serve(entry, loaded=True)
        return entry.version

    def _serve(self, entry: Entry, loaded: bool) -> None:
        name = entry.version.name
        self._retire(name)
        self._current[name] = entry.version
        self._withdrawn.discard(name)
        if loaded:
            self._loaded.add(name)

    def unload(self, name: str) -> None:
        """Serve a name no longer, until it is loaded again. Raises UnknownAdapter."""
        with self._lock:
            if name not in self._current:
                self.resolve(name)
            self._retire(name)
            if self._directory is not None and os.path.isdir(self._directory / name):
                self._withdrawn.add(name)

    def _retire(self, name: str) -> None:
        self._loaded.discard(name)
        if (version := self._current.pop(name, None)) is not None:
            self._retired.append(version)

    def take_retired(self) -> list[AdapterVersion]:
        """Versions that were replaced or unloaded since the last call."""
        with self._lock:
            retired, self._retired = self._retired, []
            return retired

    def forget(self, version: AdapterVersion) -> None:
        """A version that nothing uses any more, or a candidate that was not taken."""
        with self._lock:
            self._entries.pop(version, None)
            self._infos.pop(version, None)

    def entry(self, version: AdapterVersion) -> Entry:
        """Where a version's files are. Raises UnknownAdapter for one that was forgotten."""
        with self._lock:
            if version not in self._entries:
                raise UnknownAdapter(f"adapter {version.name!r}: this version is no longer served")
            return self._entries[version]

    def files(self, entry: Entry) -> Fingerprint | None:
        """Its files as they are now. Raises InputError as `resolve` does."""
        return fingerprint(entry.path, self._roots, entry.where)

    def info(self, version: AdapterVersion) -> AdapterInfo:
        """What a version is, from its config, which is read once. Raises InputError as `describe` does."""
        entry = self.entry(version)
        if (info := self._infos.get(version)) is None:
            info = describe(entry, self._config, self._identity, self._encoders)
            with self._lock:
                if version in self._entries:
                    self._infos[version] = info
        return info

    def names(self) -> list[str]:
        """All that is served now, sorted; scans the directory, without reading files."""
        with self._lock:
            found = set(self._loaded)
        found |= {name for name in self._scanned() if name not in self._withdrawn}
        return sorted(found)

    def infos(self, on_error: Callable[[str, InputError], None] | None = None) -> list[AdapterInfo]:
        """`info` of all names; those that cannot be served are left out and told to `on_error`."""
        found = []
        for name in self.names():
            try:
                found.append(self.info(self.resolve(name)))
            except InputError as error:
                if on_error is not None:
                    on_error(name, error)
        return found

    def _scanned(self) -> Iterator[str]:
        if self._directory is not None:
            yield from _adapters(self._directory, "", self._roots, MAX_PARTS)


def _adapters(directory: Path | str, prefix: str, roots: tuple[Path, ...], depth: int) -> Iterator[str]:
    """Names of the adapters below a directory; what lies within an adapter is none, nor is what cannot be read."""
    try:
        with os.scandir(directory) as found:
            entries = list(found)
    except OSError:  # gone by now
        return
    for entry in entries:
        name = prefix + entry.name
        try:
            if entry.name.startswith(".") or not entry.is_dir():
                continue
            if entry.is_symlink():
                confined(Path(entry.path), roots, name)
            check_name(name)
            files = set(os.listdir(entry.path))
        except (InputError, OSError):  # not one that could be asked for, or gone by now
            continue
        if WEIGHTS in files and files & {PEFT_CONFIG, OWN_CONFIG}:
            yield name
        elif depth > 1:
            yield from _adapters(entry.path, f"{name}/", roots, depth - 1)
