"""Loading adapters from a real directory: whose files a key may name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.serve.adapters.shelf import base, save
from tests.serve.http.fakes import FakeEngine, Info, Running, make_server, served

from jora.serve.adapters.catalogue import Catalogue
from jora.serve.http.auth import Keys


class Shelved(FakeEngine):
    """Loads as the engine does, but for the weights."""

    def __init__(self, tokenizer: object, directory: Path) -> None:
        super().__init__(tokenizer)
        self.catalogue = Catalogue(directory, base().config, base().identity)

    async def load_adapter(self, name: str, path: str) -> Info:
        info = self.catalogue.info(self.catalogue.commit(self.catalogue.candidate(name, path)))
        self.known[name] = Info(name, str(info.path))
        return self.known[name]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "adapters"
    for name in ("acme/mine", "umbrella/secret", "acme-not/a"):
        save(directory / name)
    (directory / "acme" / "link").symlink_to(directory / "umbrella" / "secret")
    (directory / "umbrella" / "link").symlink_to(directory / "acme" / "mine")
    return directory


@pytest.fixture
def running(directory: Path) -> Iterator[Running]:
    keys = directory.parent / "keys.yaml"
    keys.write_text("keys:\n- {key: one, client: acme, adapters: ['acme/*']}\n- {key: all, client: root}\n")
    keys.chmod(0o600)
    server = make_server(keys=Keys.load(keys), adapters=directory)
    server.backend = Shelved(server.text.tokenizer, directory)
    with served(server) as found:
        yield found


def load(running: Running, key: str, name: str, path: str) -> httpx.Response:
    with running.http() as http:
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}
        return http.post("/v1/load_lora_adapter", json=body, headers={"Authorization": f"Bearer {key}"})


FOREIGN = ["umbrella/secret", "DIR/umbrella/secret", "acme/../umbrella/secret", "acme/link", "acme-not/a", "acme/../.."]


@pytest.mark.parametrize("path", [*FOREIGN, ".", "umbrella/absent", "acme/a\0b", "/etc"])
def test_a_limited_key_cannot_load_what_is_not_its_own(running: Running, directory: Path, path: str) -> None:
    """Under a name of its own it would be served another client's adapter."""
    refused = load(running, "one", "acme/x", path.replace("DIR", str(directory)))
    assert refused.status_code == 403, refused.text
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("lora_path", "not_allowed")
    assert "umbrella" in path or "umbrella" not in error["message"]  # where a link leads is not for it
    assert "acme/x" not in running.engine.known


def test_it_loads_its_own_however_they_are_named(running: Running, directory: Path) -> None:
    for path in ("acme/mine", "acme/../acme/./mine", f"{directory}/acme/mine", "umbrella/link"):
        assert load(running, "one", "acme/x", path).status_code == 200
        assert running.engine.known["acme/x"].path == str(directory / "acme" / "mine")
    absent = load(running, "one", "acme/x", "acme/absent")
    assert absent.status_code == 400 and "no such" in absent.json()["error"]["message"]


def test_a_key_without_limits_loads_all_of_the_directory(running: Running) -> None:
    assert load(running, "all", "any", "umbrella/secret").status_code == 200
    assert load(running, "all", "any", "../..").status_code == 400
