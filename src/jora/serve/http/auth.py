"""API keys: who a request is from, what it may use and how much of it.

    keys:
      - {key: "sha256:9f86d081...", client: acme, weight: 2, rate: 10, adapters: ["acme-*"]}
      - {key: sk-plain-text, client: umbrella}

`key` is the key itself or "sha256:" and the hexadecimal digest of it. A client may have several keys (to change one
without a gap); then all say the same of it. Without a file everybody is the client "default".
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from jora.errors import InputError
from jora.reporting import SILENT, Reporter
from jora.serve.http.errors import ApiError

DEFAULT_CLIENT = "default"
_DIGEST = "sha256:"


@dataclass(frozen=True)
class Client:
    """Whom a key belongs to.

    weight: its share where clients compete, 1 is usual. rate: requests a second (`RateLimiter`), None is no limit.
    allowed: patterns of the adapters that it may use and manage, as a shell's (`acme-*`); None allows all. The base is
    open to all.
    """

    name: str
    weight: float = 1.0
    rate: float | None = None
    allowed: frozenset[str] | None = None

    def may_use(self, adapter: str) -> bool:
        return self.allowed is None or any(fnmatchcase(adapter, pattern) for pattern in self.allowed)

    def check_adapter(self, adapter: str) -> None:
        """Raise `ApiError` 403 for an adapter that is not this client's."""
        if not self.may_use(adapter):
            raise ApiError(403, f"this API key may not use the model {adapter!r}", param="model", code="not_allowed")


class Keys:
    """The clients by their keys; `reload` reads the file again."""

    def __init__(self, path: Path | None = None, reporter: Reporter = SILENT) -> None:
        self.path = path
        # Keys are compared by a keyed hash: where a look-up fails says nothing about a key to who does not know the
        # secret, so its time tells nothing, and a thousand keys cost as much as one.
        self._secret = secrets.token_bytes(32)
        self._clients: dict[bytes, Client] = {}
        if path is not None:
            self.reload(reporter)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None, reporter: Reporter = SILENT) -> Keys:
        """The keys of a YAML or JSON file; of None, the one client "default" without a key.

        Raises:
            InputError: an unreadable file, or an entry that cannot be used. A key is never part of the message.
        """
        return cls(None if path is None else Path(path).expanduser(), reporter)

    def __repr__(self) -> str:
        return f"Keys({self.path}, {len(self._clients)} keys)"

    def reload(self, reporter: Reporter = SILENT) -> None:
        """Read the file again; where it cannot be used, InputError and the keys stay as they are."""
        if self.path is None:
            return
        entries = _read(self.path)
        clients: dict[bytes, Client] = {}
        by_name: dict[str, Client] = {}
        for number, entry in enumerate(entries, start=1):
            where = f"{self.path}: key {number}"
            digest, client = _entry(entry, where)
            if by_name.setdefault(client.name, client) != client:
                raise InputError(f"{where}: client {client.name!r} stands there twice with different options")
            if (blinded := self._blind(digest)) in clients:
                raise InputError(f"{where}: the same key stands there twice")
            clients[blinded] = client
        if stat.S_IMODE(self.path.stat().st_mode) & stat.S_IROTH:
            reporter.note(f"warning: {self.path} can be read by everybody on this machine; chmod 600 it")
        self._clients = clients

    @property
    def required(self) -> bool:
        return self.path is not None

    @property
    def weights(self) -> Mapping[str, float]:
        """The clients' shares, by name."""
        return {client.name: client.weight for client in self._clients.values()}

    def client(self, authorization: str | None) -> Client:
        """Who sent this `Authorization` header.

        Raises:
            ApiError: 401, where keys are needed and this is none.
        """
        if not self.required:
            return Client(DEFAULT_CLIENT)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("no API key: send the header `Authorization: Bearer KEY`", "missing_api_key")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        client = self._clients.get(self._blind(digest))
        if client is None:
            raise _unauthorized("this API key is not known", "invalid_api_key")
        return client

    def _blind(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _read(path: Path) -> list[Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--keys {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        # No `from error`, and not its text: it may quote a line with a key.
        raise InputError(f"--keys {path}{f', line {mark.line + 1}' if mark else ''}: not YAML in UTF-8") from None
    entries = values.get("keys") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--keys {path}: write a list `keys`, each `{{key: ..., client: ...}}`")
    return entries


def _entry(entry: Any, where: str) -> tuple[bytes, Client]:
    """The SHA-256 of a key, and its client."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: not `{{key: ..., client: ...}}`")
    if unknown := entry.keys() - {"key", "client", "weight", "rate", "adapters"}:
        # Its name is not repeated: under a slip of indentation it may be a key.
        raise InputError(f"{where}: {len(unknown)} unknown fields; there are key, client, weight, rate and adapters")
    name, adapters = entry.get("client"), entry.get("adapters")
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: `client` must be a name")
    if adapters is not None and not (isinstance(adapters, list) and all(isinstance(a, str) for a in adapters)):
        raise InputError(f"{where}: `adapters` must be a list of names or patterns")
    return _digest(entry.get("key"), where), Client(
        name=name,
        weight=_number(entry.get("weight", 1.0), "weight", where),
        rate=None if entry.get("rate") is None else _number(entry["rate"], "rate", where),
        allowed=None if adapters is None else frozenset(adapters),
    )


def _digest(key: Any, where: str) -> bytes:
    if not isinstance(key, str) or not key.strip():
        raise InputError(f"{where}: `key` must be a string that is not empty (quote a key of digits)")
    if not key.startswith(_DIGEST):
        return hashlib.sha256(key.strip().encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix(_DIGEST))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise InputError(f"{where}: after `sha256:` there must be 64 hexadecimal digits")
    return digest


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: `{name}` must be a number above 0")
    return float(value)
