"""What the handlers of a server share, and what each request passes first."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import Request as HttpRequest

from jora.errors import InputError
from jora.serve.http.auth import Client, Keys
from jora.serve.http.backend import AdapterInfo, Backend
from jora.serve.http.documents import Retriever
from jora.serve.http.errors import ApiError, as_api_error, invalid, unknown_model
from jora.serve.http.limits import BODY_BYTES, RateLimiter
from jora.serve.http.metrics import Metrics
from jora.serve.http.prompting import Renderer
from jora.serve.http.sampling import Structure
from jora.serve.http.streaming import Feed
from jora.serve.http.tokens import Text
from jora.serve.requests import Request, SamplingOptions
from jora.serve.text.grammar import Grammars

GRAMMAR_CHARACTERS = 1 << 17  # OpenAI's bound of what a schema says is 120,000


class Caller(NamedTuple):
    """Who asks, of which model (as it was named; `adapter` None is the base), until when."""

    client: Client
    model: str
    adapter: str | None
    deadline: float | None


@dataclass
class Server:
    """A model behind HTTP.

    model: the base's name for clients. ready: set when the engine is warm. draining: set when no new requests are to
    be taken; those that run go on. open: requests that were let in and whose handlers have not ended. adapters: the
    directory that they are served from. allow_adapter_loading: whether clients may load and unload adapters.
    body_bytes: most bytes of a request's body.
    """

    backend: Backend
    text: Text
    grammars: Grammars
    model: str
    keys: Keys = field(default_factory=Keys)
    metrics: Metrics = field(default_factory=Metrics)
    rates: RateLimiter = field(default_factory=RateLimiter)
    retriever: Retriever | None = None
    adapters: Path | None = None
    allow_adapter_loading: bool = False
    body_bytes: int = BODY_BYTES
    fingerprint: str = "jora"
    created: int = field(default_factory=lambda: int(time.time()))
    ready: bool = False
    draining: bool = False
    open: int = 0
    renderer: Renderer = field(init=False)

    def __post_init__(self) -> None:
        self.renderer = Renderer(self.text.tokenizer)

    def client(self, http: HttpRequest) -> Client:
        return self.keys.client(http.headers.get("authorization"))

    @contextmanager
    def admit(self, http: HttpRequest, model: str, timeout: float | None = None, answers: int = 1) -> Iterator[Caller]:
        """Let a request for so many answers in, until it is left: 401 or 403, 429 above the client's rate, 503 while
        draining or not ready. A drain waits for it.
        """
        client = self.client(http)
        if self.draining or not self.ready:
            state = "shutting down" if self.draining else "starting"
            raise ApiError(503, f"the server is {state}; try again", code="unavailable", headers={"Retry-After": "5"})
        adapter = None if model == self.model else model
        if adapter is not None:
            client.check_adapter(adapter)
        self.rates.admit(client, answers)
        with self.held_open():
            try:
                yield Caller(client, model, adapter, None if timeout is None else time.monotonic() + timeout)
            except (ApiError, InputError) as error:
                refused = as_api_error(error)
                if refused is not None and refused.status < 500:  # there are no answers: it was one request
                    self.rates.give_back(client, answers - 1)
                raise

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Count a request that was let in. From its admission on: what is tokenised is not the engine's work yet, and
        a drain must wait for it. A stream's handler ends once it has begun, and the rest is the engine's work.
        """
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def adapter(self, name: str, client: Client) -> AdapterInfo:
        """An adapter that is served and that the client may use; else 404."""
        for info in await self.backend.adapters():
            if info.name == name and client.may_use(name):
                return info
        raise unknown_model(name)

    async def grammar(self, structure: Structure | None) -> Any:
        """What a structure compiles to; in a thread of its own, as a large one takes a second."""
        if structure is None:
            return None
        if len(structure.source) > GRAMMAR_CHARACTERS:
            raise invalid(f"{structure.param}: longer than {GRAMMAR_CHARACTERS} characters", structure.param)
        try:
            return await asyncio.to_thread(self.grammars.compile, structure.kind, structure.source)
        except InputError as error:
            raise invalid(f"{structure.param}: {error}", structure.param) from None

    def feed(
        self, caller: Caller, prompts: Sequence[tuple[int, ...]], sampling: SamplingOptions, streamed: bool
    ) -> Feed:
        """Start the engine's requests of one HTTP request."""
        requests = [
            Request(uuid.uuid4().hex, prompt, sampling, caller.adapter, caller.client.name, caller.deadline, streamed)
            for prompt in prompts
        ]
        return Feed(self.backend, self.metrics, requests)
