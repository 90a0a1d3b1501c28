"""`jora serve`: its defaults, what it says at start, and how it ends under SIGTERM and SIGHUP, as a process."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from jora.cli.options import read_options
from jora.cli.serve_command import Options, engine_options_of, told, with_demo
from jora.errors import InputError
from jora.reporting import SILENT
from jora.serve.http.run import address_of, listen
from jora.serve.memory import Memory
from jora.serve.options import EngineOptions


def options(*argv: str) -> Options:
    return read_options(Options, argv, "jora serve")


def test_without_options_it_is_the_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run `jora demo` here first"):
        with_demo(options(), SILENT)
    monkeypatch.setattr("jora.demo.run.prepare_model", lambda reporter: Path("/cache/gemma"))
    (tmp_path / "jora-demo" / "run" / "adapter").mkdir(parents=True)
    chosen = with_demo(options(), SILENT)
    assert (chosen.model, chosen.adapters) == ("/cache/gemma", "jora-demo/run")
    assert with_demo(options("--adapters", "mine"), SILENT).adapters == "mine"
    given = options("--model", "org/name")
    assert with_demo(given, SILENT) is given


def test_the_engines_options(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("max_batch: 4\nrank_buckets: [8, 16]\nchunk: 64\n")
    argv = ("--model", "m", "--config", str(file), "--chunk", "128", "--pool-gb", "1.5", "--no-prefix-cache")
    argv += ("--encoders", "org/bert")
    found = engine_options_of(options(*argv), {"acme": 2.0})
    expected = EngineOptions(
        max_batch=4,
        rank_buckets=(8, 16),
        chunk=128,
        pool_bytes=1_500_000_000,
        prefix_cache=False,
        weights={"acme": 2.0},
        encoders=("org/bert",),
    )
    assert found == expected
    assert engine_options_of(options(), {}) == EngineOptions()
    with pytest.raises(InputError, match="multiple of page_tokens"):
        engine_options_of(options("--chunk", "100"), {})


@pytest.mark.parametrize("required", [False, True])
def test_what_it_says_at_start(required):
    server = SimpleNamespace(model="base", keys=SimpleNamespace(required=required))
    memory = Memory(weights=3 << 20, pool=2 << 30, active=5 << 20, steps=7 << 20, rest=1 << 30)
    lines = told(server, [f"adapter-{n}" for n in range(20)], memory, "http://127.0.0.1:8000")
    assert "base, 20 adapters: adapter-0" in lines[0] and "adapter-19" not in lines[0]
    assert "http://127.0.0.1:8000/v1" in lines[1]
    assert "weights 3 MiB" in lines[2] and "page pool 2.0 GiB" in lines[2]
    command = shlex.split(lines[3].removeprefix("try"))
    assert command[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert ("Authorization: Bearer $KEY" in command) == required
    assert json.loads(command[-1])["model"] == "adapter-0"
    assert '"model": "base"' in told(server, [], memory, "x")[3]


def test_a_port_in_use_is_one_line_before_anything_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a model to the eye, which would be refused when it is loaded
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [sys.executable, "-m", "jora", "serve", "--model", str(tmp_path), "--port", port]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"--port {port}" in done.stderr and "in use" in done.stderr


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 1), ("127.0.0.1", 70000), ("192.0.2.1", 0)])
def test_an_address_that_is_none_of_ours(host, port):
    with pytest.raises(InputError, match="--host"):
        listen(host, port)


def test_the_address_is_one_to_ask():
    with listen("0.0.0.0", 0) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


# A server without an engine, whose answers end when a file is there.
PROGRAM = """
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from jora.serve.http.auth import Keys
from jora.serve.http.run import address_of, listen, serve

class Reporter:
    def note(self, text): print("note:", text, flush=True)

drain_seconds, keys, finish = float(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
server, app, running = SimpleNamespace(draining=False, open=0, keys=Keys.load(keys)), FastAPI(), set()

@app.get("/ready")
async def ready():
    return JSONResponse({}, 503 if server.draining else 200)

@app.get("/slow")
async def slow():
    async def parts():
        running.add(1)
        for part in range(10):
            yield b"part "
        while not finish.exists():
            await asyncio.sleep(0.01)
        running.clear()
        yield b"end"
    return StreamingResponse(parts())

async def drain(limit):
    async def idle():
        while running:
            await asyncio.sleep(0.01)
    try:
        await asyncio.wait_for(idle(), limit)
    except TimeoutError:
        return False
    return True

with listen("127.0.0.1", 0) as bound:
    print(address_of(bound), flush=True)
    serve(app, server, bound, drain=drain, drain_seconds=drain_seconds, reporter=Reporter())
print("after", flush=True)
"""


SECONDS = 60  # more than anything takes on a busy machine


class Running:
    """The program as a process, with one request under way; it ends with `finish.touch()`."""

    def __init__(self, keys: Path, drain_seconds: float) -> None:
        self.finish = keys.with_suffix(".finish")
        keys.write_text("keys: [{key: first, client: acme}]\n")
        keys.chmod(0o600)
        argv = [sys.executable, "-c", PROGRAM, str(drain_seconds), str(keys), str(self.finish)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.answer = b""
        self.begun = threading.Event()
        while self.ready() is None:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        assert self.begun.wait(SECONDS)

    def note(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def read(self) -> None:
        try:
            with httpx.stream("GET", f"{self.address}/slow", timeout=SECONDS) as response:
                for part in response.iter_raw():
                    self.answer += part
                    self.begun.set()
        except httpx.RemoteProtocolError:
            pass

    def ready(self) -> int | None:
        try:
            return httpx.get(f"{self.address}/ready", timeout=SECONDS).status_code
        except httpx.ConnectError:
            return None

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=SECONDS)
        self.reader.join(timeout=SECONDS)
        return self.process.returncode, out, err


def test_sigterm_finishes_what_runs(tmp_path):
    running = Running(tmp_path / "keys.yaml", drain_seconds=SECONDS)
    assert running.ready() == 200
    running.process.send_signal(signal.SIGHUP)
    assert "keys read again" in running.note()
    (tmp_path / "keys.yaml").write_text("keys: broken")
    running.process.send_signal(signal.SIGHUP)
    assert "stay as they are" in running.note()
    running.process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in running.note()
    assert running.ready() == 503  # it still answers
    running.finish.touch()
    code, out, err = running.end()
    assert (code, out, err) == (0, "after\n", "")
    assert running.answer == b"part " * 10 + b"end"
    assert running.ready() is None


def test_a_second_signal_ends_it_at_once(tmp_path):
    running = Running(tmp_path / "keys.yaml", drain_seconds=SECONDS)
    running.process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in running.note()
    before = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    code, out, _ = running.end()
    assert time.monotonic() - before < SECONDS / 2
    assert code == 128 + signal.SIGTERM and "after" not in out


def test_what_does_not_finish_in_time_is_cut_off(tmp_path, monkeypatch):
    running = Running(tmp_path / "keys.yaml", drain_seconds=0.2)
    running.process.send_signal(signal.SIGINT)
    code, out, _ = running.end()
    assert code == 0 and "cut off" in out and out.endswith("after\n")
    assert b"end" not in running.answer
