"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from jora.serve.http import sampling as fields
from jora.serve.http.answers import Collected, Tally, completion_logprobs, prompt_logprobs_body
from jora.serve.http.errors import invalid
from jora.serve.http.responses import Completion, CompletionChoice, CompletionLogprobs, Finish
from jora.serve.http.schemas import CompletionRequest
from jora.serve.http.server import Caller, Server
from jora.serve.http.streaming import STREAMED, Feed, respond
from jora.serve.requests import Event, FinishReason, Logprobs, SamplingOptions

DEFAULT_MAX_TOKENS = 16  # OpenAI's


class _Call:
    """One request of the endpoint: its prompts, and the answers as they are written."""

    def __init__(
        self, server: Server, body: CompletionRequest, caller: Caller, texts: list[str], prompts: list[tuple[int, ...]]
    ) -> None:
        self.server, self.body, self.caller, self.texts, self.prompts = server, body, caller, texts, prompts
        self.n = body.n or 1
        self.tally = Tally(prompts)
        # OpenAI's way to score a text: no answer at all. The engine gives at least one token, which is not shown.
        self.scoring = body.max_tokens == 0
        self._offsets: dict[int, int] = {}  # choice -> characters of its text so far, where log probabilities say so
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": caller.model,
            "system_fingerprint": server.fingerprint,
        }

    @property
    def engine_prompt_logprobs(self) -> int | None:
        wanted = [self.body.prompt_logprobs, self.body.logprobs if self.body.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    async def whole(self, feed: Feed) -> Completion:
        answers = [Collected() for _ in range(self.n * len(self.prompts))]
        async for position, event in feed:
            event = self._seen(position, event)
            answers[position * self.n + event.index].add(event)
        choices = [self._choice(at, answer) for at, answer in enumerate(answers)]
        return Completion(**self._head, choices=choices, usage=self.tally.usage())

    async def chunks(self, feed: Feed) -> AsyncIterator[Completion]:
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = self._head | ({"usage": None} if include_usage else {})
        async for position, event in feed:
            event = self._seen(position, event)
            choice = position * self.n + event.index
            part = Collected()
            part.add(event)
            if part.text or part.logprobs or part.finish or (self.body.echo and choice not in self._offsets):
                yield Completion(**head, choices=[self._choice(choice, part)])
        if include_usage:
            yield Completion(**self._head, choices=[], usage=self.tally.usage())

    def _seen(self, position: int, event: Event) -> Event:
        if self.scoring:
            finish: FinishReason | None = None if event.finish is None else "length"
            event = Event(event.request, event.index, prompt_logprobs=event.prompt_logprobs, finish=finish)
        self.tally.add(position, event)
        return event

    def _choice(self, index: int, answer: Collected) -> CompletionChoice:
        """A choice of what came: the whole answer, or a part of it, the first with the prompt where it is echoed."""
        text, tokens = answer.text, answer.tokens
        entries: list[Logprobs | None] = [*answer.logprobs]
        position = index // self.n
        if self.body.echo and index not in self._offsets:
            text = self.texts[position] + text
            tokens = [*self.prompts[position], *tokens]
            entries = [*(answer.prompt_logprobs or ()), *entries]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens, entries),
            "finish_reason": _finish(answer),
        }
        if answer.stopped_by is not None:
            choice["stop_reason"] = answer.stopped_by
        if self.body.prompt_logprobs is not None and answer.prompt_logprobs is not None:
            shown = prompt_logprobs_body(answer.prompt_logprobs, self.server.text, self.body.prompt_logprobs)
            choice["prompt_logprobs"] = shown
        return CompletionChoice(**choice)

    def _logprobs(self, index: int, tokens: list[int], entries: list[Logprobs | None]) -> CompletionLogprobs | None:
        offset = self._offsets.setdefault(index, 0)
        if self.body.logprobs is None:
            return None
        found = completion_logprobs(tokens, entries, self.server.text, self.body.logprobs, offset)
        self._offsets[index] = offset + sum(map(len, found.tokens))
        return found


def _finish(answer: Collected) -> Finish | None:
    return None if answer.finish is None else "length" if answer.finish == "length" else "stop"


async def _prompts(server: Server, body: CompletionRequest) -> tuple[list[str], list[tuple[int, ...]]]:
    """Prompts as text (where it is echoed) and tokens."""
    given: Any = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        texts, tokens = given, await server.text.encode(given, body.add_special_tokens)
    else:
        tokens = given
        texts = []
    prompts = [server.text.check(each, "prompt") for each in tokens]
    if body.echo and not texts:
        texts = [server.text.decode(prompt) for prompt in prompts]
    return texts, prompts


def _answers(body: CompletionRequest) -> int:
    """How many sequences are asked for."""
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    return (len(body.prompt) if several else 1) * (body.n or 1)


def _check(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of must equal n: answers are not ranked here", "best_of", "unsupported_parameter")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens must be at least 1 (0 only with echo)", "max_tokens")


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def create_completion(body: CompletionRequest, http: HttpRequest) -> Response:
        with server.admit(http, body.model, body.timeout, _answers(body)) as caller:
            stream = fields.checked_stream(body)
            _check(body)
            call = _Call(server, body, caller, *await _prompts(server, body))
            grammar = await server.grammar(fields.structure(body, body.response_format))
            feed = server.feed(caller, call.prompts, _sampling(call, grammar), stream)
            return await respond(http, feed, (lambda: call.chunks(feed)) if stream else None, lambda: call.whole(feed))

    return routes


def _sampling(call: _Call, grammar: Any) -> SamplingOptions:
    body = call.body
    return fields.sampling_options(
        body,
        max_tokens=1 if call.scoring else body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        prompt_logprobs=call.engine_prompt_logprobs,
        grammar=grammar,
        vocab_size=call.server.text.vocab_size,
    )
