"""The end: what was let in is answered, within the time that there is for it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from tests.serve.http.fakes import make_server

from jora.reporting import SILENT
from jora.serve.http import run
from jora.serve.http.app import create_app

SECONDS = 60.0  # most for anything to come true
FLUSH = 1


async def idle(seconds: float) -> bool:
    """The engine has nothing to do."""
    return True


def ready(url: str) -> int:
    try:
        return httpx.get(f"{url}/ready").status_code
    except httpx.TransportError:
        return 0


def wait(url: str, status: int) -> None:
    until = time.monotonic() + SECONDS
    while ready(url) != status:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_on_its_way_to_the_engine_is_answered(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """Its prompt is tokenised when the signal comes, for longer than responses have to reach their clients."""
    monkeypatch.setattr(run, "FLUSH_SECONDS", FLUSH)
    server = make_server()
    encode, begun, go_on = server.text.encode, threading.Event(), threading.Event()

    async def slow(texts: Sequence[str], special: bool) -> list[list[int]]:
        begun.set()
        await asyncio.to_thread(go_on.wait, SECONDS)
        return await encode(texts, special)

    monkeypatch.setattr(server.text, "encode", slow)
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "stream": stream}

    def client(url: str) -> httpx.Response:
        wait(url, 200)
        asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=SECONDS)
        begun.wait(SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        wait(url, 503)
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 503
        time.sleep(FLUSH + 0.5)
        go_on.set()
        return asked.result()

    with run.listen("127.0.0.1", 0) as bound, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(client, run.address_of(bound))
        run.serve(create_app(server), server, bound, drain=idle, drain_seconds=SECONDS, reporter=SILENT)
        assert answer.result().status_code == 200 and "Answer" in answer.result().text
    assert server.open == 0


def test_it_waits_for_what_was_let_in_and_then_for_the_engine() -> None:
    server = make_server()
    left: list[float] = []

    async def busy(seconds: float) -> bool:
        assert server.open == 0
        left.append(seconds)
        return False

    with server.held_open():
        before = time.monotonic()
        assert not asyncio.run(run.drained(server, idle, 0.1))
        assert 0.1 <= time.monotonic() - before < 5
    assert asyncio.run(run.drained(server, idle, 0.1))

    async def test() -> bool:
        with server.held_open():
            draining = asyncio.create_task(run.drained(server, busy, 5.0))
            await asyncio.sleep(0.2)
            assert not left
        return await draining

    assert not asyncio.run(test())
    assert 0 < left[0] <= 4.8
