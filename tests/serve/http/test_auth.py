"""API keys: who is let in as whom, what is refused, and that no message repeats a key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml
from tests.serve.http.fakes import make_server, served

from jora.errors import InputError
from jora.serve.http.auth import Client, Keys
from jora.serve.http.errors import ApiError

SECRET = "sk-very-secret-key"
DIGEST = hashlib.sha256(b"sk-of-umbrella").hexdigest()
ENTRIES = [
    {"key": SECRET, "client": "acme", "weight": 2, "rate": 5, "adapters": ["acme-*", "shared"]},
    {"key": f"sha256:{DIGEST}", "client": "umbrella"},
]


class Notes:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def start(self, total, what, done=0) -> None: ...
    def update(self, done, **fields) -> None: ...
    def finish(self, **fields) -> None: ...


def written(path: Path, entries: object, mode: int = 0o600) -> Path:
    path.write_text(json.dumps({"keys": entries}) if path.suffix == ".json" else yaml.safe_dump({"keys": entries}))
    path.chmod(mode)
    return path


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_key_is_its_client(tmp_path, name):
    keys = Keys.load(written(tmp_path / name, ENTRIES))
    acme = keys.client(f"Bearer {SECRET}")
    assert acme == Client("acme", 2.0, 5.0, frozenset({"acme-*", "shared"}))
    assert keys.client("bearer  sk-of-umbrella ") == Client("umbrella")
    assert keys.weights == {"acme": 2.0, "umbrella": 1.0}
    assert acme.may_use("acme-7") and acme.may_use("shared") and not acme.may_use("umbrella-1")
    with pytest.raises(ApiError) as refused:
        acme.check_adapter("Acme-7")
    assert refused.value.status == 403
    keys.client("Bearer sk-of-umbrella").check_adapter("anything")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", SECRET, f"Basic {SECRET}", "Bearer wrong", f"Bearer sha256:{DIGEST}"]
)
def test_anything_else_is_401(tmp_path, header):
    keys = Keys.load(written(tmp_path / "keys.yaml", ENTRIES))
    with pytest.raises(ApiError) as refused:
        keys.client(header)
    assert refused.value.status == 401
    assert refused.value.headers["WWW-Authenticate"] == "Bearer"
    assert SECRET not in str(refused.value)


def test_without_a_file_everybody_is_one_client():
    assert Keys.load(None).client("Bearer whatever") == Keys.load(None).client(None) == Client("default")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "a list `keys`"),
        ([SECRET], "key 1"),
        ([{"key": SECRET}], "`client`"),
        ([{"client": "acme"}], "`key`"),
        ([{"key": 12345, "client": "acme"}], "quote a key of digits"),
        ([{"key": "sha256:abcd", "client": "acme"}], "64 hexadecimal"),
        ([{"key": SECRET, "client": "acme", "weight": 0}], "`weight`"),
        ([{"key": SECRET, "client": "acme", "rate": "fast"}], "`rate`"),
        ([{"key": SECRET, "client": "acme", "adapters": "all"}], "`adapters`"),
        ([{"key": "a", "client": "acme", SECRET: 1}], "unknown"),
        ([{"key": SECRET, "client": "a"}, {"key": SECRET, "client": "b"}], "the same key"),
        ([{"key": SECRET, "client": "a"}, {"key": "b", "client": "a", "weight": 3}], "different options"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_without_the_key(tmp_path, entries, words):
    with pytest.raises(InputError) as mistake:
        Keys.load(written(tmp_path / "keys.yaml", entries))
    assert words in str(mistake.value) and "keys.yaml" in str(mistake.value)
    assert SECRET not in str(mistake.value) and "\n" not in str(mistake.value)


def test_broken_yaml_does_not_show_the_line_with_the_key(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(f'keys:\n  - {{key: "{SECRET}, client: acme}}\n')
    with pytest.raises(InputError) as mistake:
        Keys.load(path)
    assert SECRET not in str(mistake.value) and mistake.value.__cause__ is None


def test_reload_takes_the_new_keys_or_keeps_the_old(tmp_path):
    path = written(tmp_path / "keys.yaml", ENTRIES)
    keys = Keys.load(path)
    written(path, [{"key": "new", "client": "acme"}])
    keys.reload()
    assert keys.client("Bearer new").name == "acme"
    with pytest.raises(ApiError):
        keys.client(f"Bearer {SECRET}")
    path.write_text("keys: nothing")
    with pytest.raises(InputError):
        keys.reload()
    assert keys.client("Bearer new").name == "acme"


def test_a_file_that_everybody_can_read_is_pointed_out(tmp_path):
    notes = Notes()
    Keys.load(written(tmp_path / "private.yaml", ENTRIES), notes)
    assert notes.lines == []
    Keys.load(written(tmp_path / "open.yaml", ENTRIES, 0o644), notes)
    assert len(notes.lines) == 1 and "chmod 600" in notes.lines[0]


def test_no_key_is_kept_in_the_clear(tmp_path):
    keys = Keys.load(written(tmp_path / "keys.yaml", ENTRIES))
    held = repr(keys) + repr(vars(keys))
    assert SECRET not in held and DIGEST not in held
    assert repr(hashlib.sha256(SECRET.encode()).digest()) not in held


def test_who_may_manage_adapters(tmp_path: Path) -> None:
    """Those that a key may use, at its rate, and nobody while the server drains."""
    path = tmp_path / "keys.yaml"
    one, two = "{key: one, client: acme, adapters: ['acme/*']}", "{key: two, client: slow, rate: 0.001}"
    path.write_text(f"keys:\n- {one}\n- {two}\n")
    path.chmod(0o600)
    with served(make_server(keys=Keys.load(path), adapters=tmp_path)) as running, running.http() as http:

        def post(what: str, key: str, name: str) -> int:
            body = {"lora_name": name} | ({"lora_path": "acme/files"} if what == "load" else {})
            headers = {"Authorization": f"Bearer {key}"}
            return http.post(f"/v1/{what}_lora_adapter", json=body, headers=headers).status_code

        assert (post("load", "one", "other"), post("unload", "one", "alpha")) == (403, 403)
        assert set(running.engine.known) == {"alpha", "beta"}
        assert post("load", "one", "acme/x") == 200
        assert [post("load", "two", "y"), post("unload", "two", "y")] == [200, 429]
        running.server.draining = True
        assert (post("load", "one", "acme/z"), post("unload", "one", "acme/x")) == (503, 503)
        assert "acme/x" in running.engine.known
