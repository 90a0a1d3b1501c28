"""An engine that answers by rule, and what a server around it needs: the HTTP side is tested without a model."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import openai
import uvicorn
from tests.data import tokenizers

from jora.errors import InputError
from jora.serve.http.app import create_app
from jora.serve.http.server import Server
from jora.serve.http.tokens import Text
from jora.serve.requests import Event, FinishReason, Logprobs, Request, UnknownAdapter, Usage
from jora.serve.stats import EngineStats

MAX_LENGTH = 1 << 20
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ '' + (mood or '') }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Info:
    name: str
    path: str = "somewhere"
    method: str = "lora"
    rank: int | None = 8


IDLE = EngineStats(
    waiting=0,
    running=0,
    pool_pages={"free": 3, "kv": 1},
    adapters={"resident": 1, "host": 1, "known": 2},
    adapter_hits=0,
    adapter_misses=0,
    adapter_loads=0,
    adapter_failures=0,
    adapter_load_seconds=0.0,
    preemptions=0,
    cached_tokens=0,
    service={},
)


class Grammars:
    """Keeps what it is given; a text with "broken" in it cannot be compiled."""

    def compile(self, kind: str, text: str = "") -> Any:
        if "broken" in text:
            raise InputError("it is broken")
        return kind, text


def default_script(request: Request, index: int) -> str:
    return f"Answer {index} of {request.adapter or 'base'} to {len(request.prompt)} tokens, naïve 日本 😀."


class FakeEngine:
    """Answers with `script`, a token each `delay` seconds after `queued` and `prefill` seconds.

    refusal: what `stream` raises, after `refuse_after` requests. ends: how answers end in place of "stop".
    """

    def __init__(self, tokenizer: Any, script: Callable[[Request, int], str] = default_script) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.delay = self.queued = self.prefill = 0.0
        self.refusal: Exception | None = None
        self.refuse_after = 0  # requests
        self.together = 0  # nothing is answered before so many requests are there
        self.ends: FinishReason = "stop"
        self.known = {"alpha": Info("alpha", rank=8), "beta": Info("beta", method="dora", rank=16)}
        self.requests: list[Request] = []
        self.cancelled: list[tuple[str, str]] = []  # (request, in which stage)
        self.running = 0
        self.peak = 0
        self.emitted = 0
        self.failure: BaseException | None = None

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        if self.refusal is not None and len(self.requests) >= self.refuse_after:
            raise self.refusal
        if request.adapter is not None and request.adapter not in self.known:
            raise UnknownAdapter(f"no adapter {request.adapter!r}")
        self.requests.append(request)
        stage = "queued"
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            while len(self.requests) < self.together:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self.queued)
            stage = "prefill"
            await asyncio.sleep(self.prefill)
            stage = "decode"
            answers = [self._answer(request, index) for index in range(request.sampling.n)]
            while answers:
                for answer in list(answers):
                    event = next(answer)
                    self.emitted += 1
                    yield event
                    if event.finish is not None:
                        answers.remove(answer)
                await asyncio.sleep(self.delay)
            stage = "done"
        finally:
            self.running -= 1
            if stage != "done":
                self.cancelled.append((request.id, stage))

    def _answer(self, request: Request, index: int) -> Iterator[Event]:
        sampling = request.sampling
        text = self.script(request, index)
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        finish: FinishReason = self.ends
        stopped = None
        for stop in sampling.stop:
            if (at := text.find(stop)) >= 0:
                text, stopped = text[:at], stop
                tokens = tokens[: len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1]
                break
        limit = sampling.max_tokens or MAX_LENGTH
        if len(tokens) > limit:
            tokens, finish, stopped = tokens[:limit], "length", None
        sent, window = "", 0  # what was sent, and how many tokens that took
        for at, token in enumerate(tokens, start=1):
            last = at == len(tokens)
            new = self.tokenizer.decode(tokens[window:at])
            if not last and new.endswith("�"):
                new = ""
            elif finish != "length":
                new = text[len(sent) :] if last else text[len(sent) : len(sent) + len(new)]
            usage = Usage(len(request.prompt), len(request.prompt) // 2, at)
            prompt = None
            if at == 1 and sampling.prompt_logprobs is not None:
                prompt = (None, *(self.logprobs(t, sampling.prompt_logprobs) for t in request.prompt[1:]))
            yield Event(
                request.id,
                index,
                (token,),
                new,
                () if sampling.logprobs is None else (self.logprobs(token, sampling.logprobs),),
                prompt,
                finish if last else None,
                stopped if last else None,
                usage,
                "it failed" if last and finish == "error" else None,
            )
            if new:
                sent, window = sent + new, at

    def logprobs(self, token: int, count: int) -> Logprobs:
        own = -float(token % 7) / 10 if token % 11 else -math.inf
        return Logprobs(token, own, 1, tuple(((token + i) % 400, -0.1 * i) for i in range(count)))

    def wait(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """From a test: until something is so in the server's thread."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.005)

    async def load_adapter(self, name: str, path: str) -> Info:
        if ".." in path:
            raise InputError(f"{path}: not inside the adapters' directory")
        self.known[name] = Info(name, path)
        return self.known[name]

    async def unload_adapter(self, name: str) -> None:
        if name not in self.known:
            raise UnknownAdapter(f"no adapter {name!r}")
        del self.known[name]

    async def adapters(self) -> list[Info]:
        return list(self.known.values())

    async def stats(self) -> EngineStats:
        return replace(IDLE, running=self.running)


def make_server(template: str | None = TEMPLATE, max_length: int = MAX_LENGTH, **options: Any) -> Server:
    tokenizer = tokenizers.qwen3(template)
    options = {"ready": True, "allow_adapter_loading": True, **options}
    return Server(
        FakeEngine(tokenizer),
        Text(tokenizer, max_length, len(tokenizer)),
        Grammars(),  # type: ignore[arg-type]
        "tiny",
        **options,
    )


@dataclass
class Running:
    """A server on a port."""

    server: Server
    host: str
    port: int

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.server.backend, FakeEngine)
        return self.server.backend

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


@contextlib.contextmanager
def served(server: Server) -> Iterator[Running]:
    """A real uvicorn in a thread."""
    config = uvicorn.Config(create_app(server), log_level="error", access_log=False, lifespan="off")
    running = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
        thread.start()
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.005)
        try:
            yield Running(server, *bound.getsockname())
        finally:
            running.should_exit = running.force_exit = True
            thread.join()
