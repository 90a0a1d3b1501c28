"""Bodies that are too large or too slow are answered before the app runs; clients are held to their rates."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from jora.serve.http.auth import Client
from jora.serve.http.limits import BodyLimit, RateLimiter
from jora.serve.requests import Rejected


class Echo:
    """An app that answers with the body that it read."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.after: Any = None

    async def __call__(self, scope, receive, send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        self.after = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(parts: list[bytes], declared: int | None = None, limit: int = 10, hang: bool = False):
    """(status, body, headers, app) of a request whose body comes in these parts, then the client goes."""
    app, sent = Echo(), []
    waiting = [
        {"type": "http.request", "body": part, "more_body": hang or i < len(parts) - 1} for i, part in enumerate(parts)
    ]

    async def receive():
        if waiting:
            return waiting.pop(0)
        if hang:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(BodyLimit(app, limit, seconds=0.05)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"]), app, waiting


def test_a_body_within_the_limit_arrives_whole_and_what_follows_too():
    status, body, _, app, _ = ask([b"12345", b"67890"])
    assert (status, body, app.bodies) == (200, b"1234567890", [b"1234567890"])
    assert app.after == {"type": "http.disconnect"}


@pytest.mark.parametrize(("parts", "declared"), [([b"x"], 11), ([b"12345", b"67890", b"1", b"2"], None)])
def test_a_larger_one_is_413_and_the_app_never_runs(parts, declared):
    status, body, headers, app, waiting = ask(parts, declared)
    assert status == 413 and app.bodies == []
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert headers[b"connection"] == b"close"
    assert waiting, "it must not read on"


def test_one_that_does_not_come_is_408():
    status, body, _, app, _ = ask([b"12"], hang=True)
    assert status == 408 and app.bodies == [] and json.loads(body)["error"]["code"] == "timeout"


def test_a_rate_is_held_and_time_gives_it_back():
    now = [100.0]
    limiter = RateLimiter(lambda: now[0])
    client = Client("acme", rate=2.0)
    for _ in range(2):
        limiter.admit(client)
    with pytest.raises(Rejected) as refused:
        limiter.admit(client)
    assert refused.value.retry_after == pytest.approx(0.5)
    limiter.admit(Client("other", rate=2.0))  # each has its own
    now[0] += refused.value.retry_after
    limiter.admit(client)
    with pytest.raises(Rejected):
        limiter.admit(client)
    now[0] += 1000.0  # idling banks one second's worth, not more
    for _ in range(2):
        limiter.admit(client)
    with pytest.raises(Rejected):
        limiter.admit(client)


def test_every_answer_counts_and_many_are_made_up_for():
    now = [0.0]
    limiter = RateLimiter(lambda: now[0])
    client = Client("acme", rate=2.0)
    limiter.admit(client, 6)  # there is room for one
    with pytest.raises(Rejected) as refused:
        limiter.admit(client)
    assert refused.value.retry_after == pytest.approx(2.5)
    now[0] += refused.value.retry_after
    limiter.admit(client, 100)
    limiter.give_back(client, 99)
    with pytest.raises(Rejected) as refused:
        limiter.admit(client)
    assert refused.value.retry_after == pytest.approx(0.5)
    limiter.give_back(Client("free"), 5)


def test_a_rate_below_one_and_no_rate():
    now = [0.0]
    limiter = RateLimiter(lambda: now[0])
    slow = Client("slow", rate=0.1)
    limiter.admit(slow)
    with pytest.raises(Rejected) as refused:
        limiter.admit(slow)
    assert refused.value.retry_after == pytest.approx(10.0)
    for _ in range(1000):
        limiter.admit(Client("free"))
