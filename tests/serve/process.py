"""`jora serve` as a process of its own, for a tiny model with adapters, and clients for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from tests.bytewise import bytewise_tokenizer
from tests.serve.bases import SIZES, randomised
from tests.serve.http.fakes import TEMPLATE
from tests.tiny import tiny

import jora
from jora.methods.method import Method
from jora.models.model import load_model

POSITIONS = 8192  # an answer of so many tokens takes longer than any test
ADAPTERS: dict[str, Method] = {
    "one": jora.LoRA(rank=1, targets=("q_proj",)),
    "team/eight": jora.LoRA(rank=8),
    "dora": jora.DoRA(rank=4, targets=("q_proj", "v_proj")),
    "flora": jora.FLoRA(rank=2, targets=("v_proj",)),
    "nola": jora.NOLA(rank=2, bases=8, targets=("q_proj",)),
}
SECONDS = 60.0  # most for anything to come true


def make_base(directory: Path) -> str:
    """A tiny Llama with a tokenizer that has a chat template with a place for tools."""
    shutil.copytree(tiny("llama2", **{**SIZES, "max_position_embeddings": POSITIONS})[1], directory)
    tokenizer = bytewise_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return str(directory)


def make_adapters(base: str, directory: Path) -> None:
    """All of `ADAPTERS`, with random numbers."""
    model = load_model(base)
    for seed, (name, method) in enumerate(ADAPTERS.items()):
        jora.save_adapter(randomised(method, model, seed, 0.5), directory / name)


@dataclass
class Serving:
    """A server that answers. `told`: the lines that it printed at start."""

    process: subprocess.Popen[str]
    told: list[str]
    url: str
    key: str

    def openai(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=SECONDS)

    def http(self, key: str | None = None) -> httpx.Client:
        header = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=header, timeout=SECONDS)

    def metrics(self) -> dict[str, float]:
        """By name with labels, as Prometheus reads them."""
        lines = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def wait(self, condition: Callable[[dict[str, float]], bool]) -> dict[str, float]:
        """The metrics, once something is so in them."""
        until = time.monotonic() + SECONDS
        while not condition(found := self.metrics()):
            assert time.monotonic() < until, found
            time.sleep(0.01)
        return found

    def idle(self) -> dict[str, float]:
        """The metrics, once nothing waits or runs."""
        return self.wait(lambda found: found["jora_requests_waiting"] == found["jora_requests_running"] == 0)

    def ask(self, *, receive_bytes: int | None = None, **body: Any) -> socket.socket:
        """Ask for a long answer over a bare connection, and leave it open."""
        body = {"model": "base", "max_tokens": POSITIONS - 100, "ignore_eos": True, "stream": True, **body}
        data = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.settimeout(SECONDS)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((host, int(port)))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        return connection


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "jora", "serve", *options]


@contextmanager
def serving(log: Path, *options: str, key: str = "none") -> Iterator[Serving]:
    """Start a server on a free port and wait until it is ready; kill it in the end if it still runs."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with log.open("w") as out:
        argv = command(*options, "--port", "0")
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        until = time.monotonic() + 4 * SECONDS
        while True:
            lines = log.read_text().splitlines()
            if (found := [line for line in lines if line.startswith("at ")]) and any("curl" in line for line in lines):
                break
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        address = found[0].split()[1].removesuffix("/v1")
        running = Serving(process, lines[lines.index(found[0]) - 1 :], address, key)
        while not _is_ready(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _is_ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False
