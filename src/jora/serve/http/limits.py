"""Bounds of what a client may send: bytes of a body, seconds it takes to come, requests a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jora.serve.http.auth import Client
from jora.serve.http.errors import ApiError, error_response
from jora.serve.requests import Rejected

BODY_BYTES = 32 << 20  # a prompt of a million token ids is 8 MB of JSON
BODY_SECONDS = 60.0


class BodyLimit:
    """ASGI middleware: a body of more than `limit` bytes is answered with 413, one that does not come with 408.

    The body is taken in before the app runs, so that one without a Content-Length (chunked) is bounded too: every
    handler here needs it whole, and an app that has begun cannot be given another answer.
    """

    def __init__(self, app: ASGIApp, limit: int = BODY_BYTES, seconds: float = BODY_SECONDS) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            messages = await self._body(scope, receive)
        except ApiError as error:
            # What was not read must not be taken for the next request.
            error.headers["Connection"] = "close"
            await error_response(error)(scope, receive, send)
            return
        waiting = iter(messages)

        async def replay() -> Message:
            for message in waiting:
                return message
            return await receive()

        await self.app(scope, replay, send)

    async def _body(self, scope: Scope, receive: Receive) -> list[Message]:
        """The messages up to the end of the body (or of the connection)."""
        if _declared(scope) > self.limit:
            raise self._too_large()
        messages: list[Message] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while not messages or messages[-1].get("more_body", False):
                    message = await receive()
                    size += len(message.get("body", b""))
                    if size > self.limit:
                        raise self._too_large()
                    messages.append(message)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self.seconds:g} seconds", code="timeout") from None
        return messages

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limit} bytes", code="body_too_large")


def _declared(scope: Scope) -> int:
    """The body's length as the header says; 0 where it does not."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class RateLimiter:
    """A token bucket a client: `client.rate` requests a second, and as many at once as a second brings (at least 1).

    Of one request for many answers each counts as a request. It is let in where there is room for one, as no rate
    would ever have room for all of them, and what comes behind it waits until they are made up for.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> requests left (below 0: owed), as of when

    def admit(self, client: Client, count: int = 1) -> None:
        """Count a request for so many answers.

        Raises:
            Rejected: there are too many; `retry_after` says when there is room for one.
        """
        if client.rate is None:
            return
        now, burst = self._clock(), max(1.0, client.rate)
        left, since = self._buckets.get(client.name, (burst, now))
        left = min(burst, left + (now - since) * client.rate)
        if left < 1.0:
            self._buckets[client.name] = left, now
            raise Rejected(f"more than {client.rate:g} requests a second", (1.0 - left) / client.rate)
        self._buckets[client.name] = left - count, now

    def give_back(self, client: Client, count: int) -> None:
        """Take back so many of what was counted."""
        if client.rate is not None and client.name in self._buckets:
            left, since = self._buckets[client.name]
            self._buckets[client.name] = left + count, since
