"""Clients that go away, at every stage, and clients that read slowly: raw sockets against a real uvicorn."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.serve.http.fakes import FakeEngine, Running

from jora.serve.http.streaming import WAITING_EVENTS

LONG = "word " * 2000


def ask(running: Running, path: str = "/v1/completions", slow: bool = False, **body: Any) -> socket.socket:
    """Send a request and leave the connection open."""
    body = {"model": "tiny", "max_tokens": 100_000, **body}
    body.setdefault(*(("prompt", "a") if "chat" not in path else ("messages", [{"role": "user", "content": "a"}])))
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.settimeout(10)
    if slow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((running.host, running.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [close, reset])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queued", "prefill", "decode"])
def test_a_client_that_leaves_cancels_its_request(
    running: Running, engine: FakeEngine, stage: str, stream: bool, path: str, leave: Callable[[socket.socket], None]
) -> None:
    engine.queued = 60.0 if stage == "queued" else 0.0
    engine.prefill = 60.0 if stage == "prefill" else 0.0
    engine.delay = 0.01
    engine.script = lambda request, index: LONG
    connection = ask(running, path, stream=stream)
    engine.wait(lambda: engine.running == 1)
    if stage == "decode":
        engine.wait(lambda: engine.emitted > 3)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    leave(connection)
    engine.wait(lambda: engine.cancelled != [])
    assert [found for _, found in engine.cancelled] == [stage] and engine.running == 0


def test_every_prompt_of_a_request_is_cancelled(running: Running, engine: FakeEngine) -> None:
    engine.queued = 60.0
    connection = ask(running, prompt=["a", "b", "c"], n=2)
    engine.wait(lambda: engine.running == 3)
    connection.close()
    engine.wait(lambda: engine.running == 0)
    assert len(engine.cancelled) == 3


def test_a_client_that_leaves_while_the_body_comes(running: Running, engine: FakeEngine, http: httpx.Client) -> None:
    with socket.create_connection((running.host, running.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert http.get("/health").status_code == 200 and engine.requests == []


def slow_reader(running: Running, engine: FakeEngine) -> socket.socket:
    """A stream whose reader does not read, until it is held back."""
    engine.script = lambda request, index: "word " * 3_000
    connection = ask(running, slow=True, stream=True, logprobs=20)
    engine.wait(lambda: engine.emitted > 100)
    while True:
        before = engine.emitted
        time.sleep(0.3)
        if engine.emitted == before:
            return connection


def test_a_slow_reader_is_held_back_and_holds_up_nobody(
    running: Running, engine: FakeEngine, http: httpx.Client
) -> None:
    connection = slow_reader(running, engine)
    # What the server took and has not sent is in the sockets' buffers and its own few events: far from the answer.
    whole = len(engine.tokenizer("word " * 3_000)["input_ids"])
    assert WAITING_EVENTS < engine.emitted < 0.9 * whole
    taken = engine.emitted
    engine.script = lambda request, index: "quick"
    for _ in range(5):
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "a"}).json()
        assert answer["choices"][0]["text"] == "quick"
    assert engine.emitted < taken + 100
    connection.close()
    engine.wait(lambda: engine.cancelled != [])
    assert engine.running == 0


def test_a_reader_that_wakes_up_misses_nothing(running: Running, engine: FakeEngine) -> None:
    connection = slow_reader(running, engine)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    data = b""
    while b"data: [DONE]\n\n" not in data[-100:]:
        piece = connection.recv(1 << 20)
        assert piece
        data += piece
    connection.close()
    text = "".join(
        json.loads(line[6:])["choices"][0]["text"]
        for line in data.decode().splitlines()
        if line.startswith('data: {"id"')
    )
    assert text == "word " * 3_000
