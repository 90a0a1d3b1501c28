"""Events from the engine to the client, and the client's going back to the engine.

A client that goes away is noticed in every stage, because whoever waits for the engine watches the connection too. A
slow reader is held back by its own connection: `Feed` holds a few events, then stops to fetch, and the engine joins
what waits (see `Backend.stream`). Its chunks grow, nothing is lost, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jora.errors import InputError
from jora.serve.http.backend import Backend
from jora.serve.http.errors import ApiError, ClientGone, as_api_error, error_body
from jora.serve.http.metrics import Metrics
from jora.serve.requests import Event, Request

Result = TypeVar("Result")
WAITING_EVENTS = 64  # of one response, beside those that the engine holds
# For the OpenAPI description: what an endpoint answers beside its JSON.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_ENDINGS: dict[str | None, tuple[int, str, str]] = {
    "deadline": (504, "the request did not end within its time limit", "deadline_exceeded"),
    "cancelled": (503, "the request was cancelled by the server", "cancelled"),
    "error": (400, "the engine cannot serve this request", "request_failed"),
}


class Feed:
    """The events of some engine requests as one sequence. Use as `async with`: leaving it cancels what still runs."""

    def __init__(self, backend: Backend, metrics: Metrics, requests: Sequence[Request]) -> None:
        self._backend, self._metrics = backend, metrics
        self._queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue(WAITING_EVENTS)
        self._open = len(requests)
        self._ahead: list[tuple[int, Event] | BaseException | None] = []
        self._pumps = [asyncio.create_task(self._pump(at, request)) for at, request in enumerate(requests)]

    async def _pump(self, position: int, request: Request) -> None:
        try:
            with self._metrics.request(request.client) as observe:
                # Closed here: a pump that is cancelled while it waits for a slow reader leaves the stream suspended.
                async with aclosing(self._backend.stream(request)) as events:
                    async for event in events:
                        observe(event)
                        if event.finish in _ENDINGS:
                            raise self._ending(event)
                        await self._queue.put((position, event))
        except Exception as error:  # not swallowed: the reader raises it
            await self._queue.put(error)
        else:
            await self._queue.put(None)

    def _ending(self, event: Event) -> ApiError:
        """An answer that the engine ended. Unless all of it failed, an error is of the request or its adapter."""
        if self._backend.failure is not None:
            return ApiError(500, "the engine has stopped after an error; see the log", code="engine_failed")
        status, message, code = _ENDINGS[event.finish]
        return ApiError(status, event.error or message, code=code)

    async def begun(self) -> None:
        """Wait for the first event; raises what the engine raised in its place."""
        first = await self._queue.get()
        if isinstance(first, BaseException):
            raise first
        self._ahead.append(first)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """(which request, its event), until all have ended."""
        while self._open:
            item = self._ahead.pop() if self._ahead else await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                self._open -= 1
            else:
                yield item

    @property
    def is_empty(self) -> bool:
        """Whether the next event must be waited for."""
        return not self._ahead and self._queue.empty()

    async def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def __aenter__(self) -> Feed:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; cancels it and raises `ClientGone` where the client goes first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. `chunks` are whole events as bytes; `feed` is closed at the end, whatever it is."""

    def __init__(self, feed: Feed, chunks: AsyncIterator[bytes]) -> None:
        # X-Accel-Buffering: nginx would else collect the events.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(None, headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.feed, self.chunks = feed, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(send))
        except ClientGone:
            pass
        finally:
            await self.feed.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        waiting = b""
        async for chunk in self.chunks:
            waiting += chunk
            if self.feed.is_empty:  # one write for what is there
                await send({"type": "http.response.body", "body": waiting, "more_body": True})
                waiting = b""
        await send({"type": "http.response.body", "body": waiting, "more_body": False})


async def respond(
    http: HttpRequest,
    feed: Feed,
    chunks: Callable[[], AsyncIterator[BaseModel]] | None,
    whole: Callable[[], Coroutine[Any, Any, BaseModel]],
) -> Response:
    """The response to a request whose engine requests run: a stream of `chunks` where there are, else `whole`.

    Errors that come before the first event have a status of their own, in a stream too.
    """
    if chunks is None:
        async with feed:
            return json_response(await while_connected(http.receive, whole()))
    try:
        await while_connected(http.receive, feed.begun())
    except BaseException:
        await feed.close()
        raise
    return EventStream(feed, _events(chunks()))


def json_response(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_unset=True, by_alias=True), media_type="application/json")


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield event(chunk.model_dump_json(exclude_unset=True))
    except (ApiError, InputError) as error:
        known = as_api_error(error)
        assert known is not None
        yield event(json.dumps(error_body(known)))
    yield event("[DONE]")


# Unicode's line ends, which JSON leaves as they are. Server-sent events end their lines at CR and LF only,
# but many readers (Python's `str.splitlines`, httpx's `iter_lines`) end them at these as well.
_LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})


def event(data: str) -> bytes:
    return b"data: " + data.translate(_LINE_ENDS).encode() + b"\n\n"
