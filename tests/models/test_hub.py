"""A hub id: what the hub serves is what is loaded. The hub is a small server here, with its three routes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.tiny import tiny

REPO, COMMIT = "someone/tiny-llama", "0123456789" * 4


def handler_for(folder: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """Model info, the tree of files, and the files themselves."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPO}/tree/"):
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": etag(f)}
                    for f in sorted(folder.iterdir())
                ]
                return self._send(json.dumps(tree).encode(), body)
            if path.startswith(f"/api/models/{REPO}"):
                info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in folder.iterdir()]}
                return self._send(json.dumps(info).encode(), body)
            file = folder / path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if path.startswith(f"/{REPO}/resolve/") and file.is_file():
                asked.append(file.name)
                return self._send(file.read_bytes(), body, ETag=f'"{etag(file)}"', **{"X-Repo-Commit": COMMIT})
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes, body: bool, **headers: str) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str], Path]]:
    """(endpoint, names of the files that were fetched, the directory that it serves)."""
    _, path = tiny("llama2")
    folder = Path(path)
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(folder, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked, folder
    server.shutdown()
    thread.join()
    server.server_close()


LOAD = """
import sys, numpy as np, jora
try:
    here, there = jora.load_model(sys.argv[1]), jora.load_model(sys.argv[2])
except jora.InputError as error:
    sys.exit(str(error))
tokens = np.arange(6)[None]
assert np.array_equal(here(tokens), there(tokens))
assert here.identity["fingerprint"] == there.identity["fingerprint"]
print(here.identity["name"])
"""


def load(endpoint: str, cache: Path, repo: str, local: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    command = [sys.executable, "-c", LOAD, repo, str(local)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_hub_id_is_fetched_once_and_loaded(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, asked, folder = hub
    done = load(endpoint, tmp_path, REPO, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == REPO  # the name that adapters record
    assert {"config.json", "model.safetensors"} <= set(asked)

    asked.clear()
    again = load(endpoint, tmp_path, REPO, folder)
    assert again.returncode == 0, again.stderr
    assert not asked  # all of it lies in the cache


def test_a_hub_id_that_does_not_exist_is_one_line(hub: tuple[str, list[str], Path], tmp_path: Path) -> None:
    endpoint, _, folder = hub
    done = load(endpoint, tmp_path, "someone/nothing", folder)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("someone/nothing: no such directory, and the hub did not give it")
