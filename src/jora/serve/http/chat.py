"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Response
from fastapi import Request as HttpRequest

from jora.serve.http import sampling as fields
from jora.serve.http.answers import Collected, Tally, chat_logprobs, prompt_logprobs_body
from jora.serve.http.documents import Filled
from jora.serve.http.errors import invalid
from jora.serve.http.prompting import Renderer, plain_messages, plain_tools
from jora.serve.http.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    Finish,
    FunctionBody,
    ToolCall,
)
from jora.serve.http.sampling import Structure
from jora.serve.http.schemas import ChatRequest, NamedTool
from jora.serve.http.server import Caller, Server
from jora.serve.http.streaming import STREAMED, Feed, respond
from jora.serve.http.tool_formats import Call
from jora.serve.http.tools import (
    AnswerStream,
    ForcedStream,
    Found,
    NamedStream,
    PlainStream,
    ToolStream,
    forced_schema,
    split,
)
from jora.serve.requests import Event, Logprobs

ANSWER_TOKENS = 256  # that documents leave to an answer whose request does not say


class _Call:
    """One request of the endpoint: how its answers are read and written."""

    def __init__(
        self, server: Server, body: ChatRequest, caller: Caller, prompt: tuple[int, ...], filled: Filled
    ) -> None:
        self.server, self.body, self.caller, self.prompt, self.filled = server, body, caller, prompt, filled
        self.n = body.n or 1
        self.tally = Tally([prompt])
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": caller.model,
            "system_fingerprint": server.fingerprint,
        }

    async def whole(self, feed: Feed) -> ChatCompletion:
        answers = [Collected() for _ in range(self.n)]
        async for _, event in feed:
            self.tally.add(0, event)
            answers[event.index].add(event)
        choices = [self._choice(at, answer) for at, answer in enumerate(answers)]
        extra = self._documents()
        if self.body.prompt_logprobs is not None and (found := answers[0].prompt_logprobs) is not None:
            extra["prompt_logprobs"] = prompt_logprobs_body(found, self.server.text, self.body.prompt_logprobs)
        usage = self.tally.usage()
        return ChatCompletion(**self._head, object="chat.completion", choices=choices, usage=usage, **extra)

    def _choice(self, index: int, answer: Collected) -> ChatChoice:
        content, calls = split(_answer_stream(self.body), [answer.text])
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [self._tool_call(call) for call in calls]
        message |= self._citations(content)
        return ChatChoice(
            index=index,
            message=AnswerMessage(**message),
            logprobs=self._logprobs(answer.logprobs),
            **self._ending(answer.finish, answer.stopped_by, bool(calls)),
        )

    async def chunks(self, feed: Feed) -> AsyncIterator[ChatChunk]:
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        if include_usage:
            head["usage"] = None
        extra = self._documents()
        for index in range(self.n):
            first = ChunkChoice(
                index=index, delta=Delta(role="assistant", content=""), logprobs=None, finish_reason=None
            )
            yield ChatChunk(**head, choices=[first], **extra)
            extra = {}
        answers = [_Streamed(_answer_stream(self.body)) for _ in range(self.n)]
        async for _, event in feed:
            self.tally.add(0, event)
            for choice in self._chunk_choices(event, answers[event.index]):
                yield ChatChunk(**head, choices=[choice])
        if include_usage:
            yield ChatChunk(**{**head, "usage": self.tally.usage()}, choices=[])

    def _chunk_choices(self, event: Event, answer: _Streamed) -> list[ChunkChoice]:
        """What an event adds to its choice: content, calls and the end, each in a chunk of its own."""
        found = answer.take(event)
        deltas = [Delta(content=found.content)] if found.content or event.logprobs else []
        for at, call in enumerate(found.calls, start=answer.calls - len(found.calls)):
            deltas.append(Delta(tool_calls=[self._tool_call(call, at)]))
        logprobs = self._logprobs(event.logprobs) if event.logprobs else None
        choices = []
        for delta in deltas:
            choices.append(ChunkChoice(index=event.index, delta=delta, logprobs=logprobs, finish_reason=None))
            logprobs = None  # once
        if event.finish is not None:
            last = Delta(**self._citations(answer.content))
            ending = self._ending(event.finish, event.stopped_by, answer.calls > 0)
            choices.append(ChunkChoice(index=event.index, delta=last, logprobs=None, **ending))
        return choices

    def _logprobs(self, entries: list[Logprobs] | tuple[Logprobs, ...]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs(content=chat_logprobs(entries, self.server.text), refusal=None)

    def _tool_call(self, call: Call, index: int | None = None) -> ToolCall:
        # Mistral's templates take back ids of nine characters only.
        name = uuid.uuid4().hex[:9] if self.server.renderer.is_mistral else f"call_{uuid.uuid4().hex[:24]}"
        function = FunctionBody(name=call.name, arguments=call.arguments)
        place = {} if index is None else {"index": index}
        return ToolCall(**place, id=name, type="function", function=function)

    def _ending(self, finish: str | None, stopped_by: str | int | None, called: bool) -> dict[str, Any]:
        reason: Finish = "stop"
        if finish == "length":
            reason = "length"
        elif called and not isinstance(self.body.tool_choice, NamedTool):  # OpenAI: a named function ends with "stop"
            reason = "tool_calls"
        return {"finish_reason": reason} | ({} if stopped_by is None else {"stop_reason": stopped_by})

    def _documents(self) -> dict[str, Any]:
        return {"documents": self.filled.listed()} if self.filled.documents else {}

    def _citations(self, content: str) -> dict[str, Any]:
        return {"citations": self.filled.citations(content)} if self.filled.documents else {}


class _Streamed:
    """One answer of a stream."""

    def __init__(self, stream: AnswerStream) -> None:
        self.stream = stream
        self.content, self.calls = "", 0

    def take(self, event: Event) -> Found:
        found = self.stream.feed(event.text)
        if event.finish is not None:
            rest = self.stream.finish()
            found = Found(found.content + rest.content, found.calls + rest.calls)
        self.content += found.content
        self.calls += len(found.calls)
        return found


def _answer_stream(body: ChatRequest) -> AnswerStream:
    if isinstance(body.tool_choice, NamedTool):
        return NamedStream(body.tool_choice.function.name)
    if body.tool_choice == "required":
        return ForcedStream()
    if not body.tools or body.tool_choice == "none":
        return PlainStream()
    return ToolStream({tool.function.name for tool in body.tools})


def _check(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("give max_completion_tokens or max_tokens, not both", "max_tokens")
    if 0 in (body.max_tokens, body.max_completion_tokens):
        raise invalid("max_completion_tokens must be at least 1", "max_completion_tokens")
    if body.add_generation_prompt and body.continue_final_message and "add_generation_prompt" in body.model_fields_set:
        raise invalid("add_generation_prompt and continue_final_message exclude each other", "continue_final_message")
    names = [tool.function.name for tool in body.tools or ()]
    if len(set(names)) != len(names):
        raise invalid("tools: two functions have the same name", "tools")
    if body.tool_choice not in (None, "none") and not names:
        raise invalid("tool_choice needs tools", "tool_choice")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        raise invalid("tool_choice names a function that is not in tools", "tool_choice")


def _structure(body: ChatRequest) -> Structure | None:
    """What the answer must be: what was asked for, or the calls that tool_choice forces."""
    asked = fields.structure(body, body.response_format)
    if not isinstance(body.tool_choice, NamedTool) and body.tool_choice != "required":
        return asked
    if asked is not None:
        raise invalid(f"{asked.param} and tool_choice both say what the answer must be: give one", asked.param)
    functions = {tool.function.name: tool.function.parameters for tool in body.tools or ()}
    if isinstance(body.tool_choice, NamedTool):
        schema: Any = functions[body.tool_choice.function.name] or fields.ANY_OBJECT
    else:
        schema = forced_schema(functions.items(), several=body.parallel_tool_calls is not False)
    return fields.json_structure(schema, "tools")


def _filled(server: Server, body: ChatRequest) -> Filled:
    """The messages for the template, with documents where the server has them."""
    messages = plain_messages(body.messages)
    if server.retriever is None:
        return Filled(messages)
    longest = server.text.max_length
    wanted = body.max_completion_tokens or body.max_tokens or min(ANSWER_TOKENS, longest // 2)
    return server.retriever.fill(messages, max(1, longest - wanted))


def prompt_text(renderer: Renderer, body: ChatRequest, filled: Filled) -> str:
    tools = None if body.tool_choice == "none" else plain_tools(body)
    return renderer.render(filled.messages, tools, body)


def router(server: Server) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMED)
    async def create_chat_completion(body: ChatRequest, http: HttpRequest) -> Response:
        with server.admit(http, body.model, body.timeout, body.n or 1) as caller:
            stream = fields.checked_stream(body)
            _check(body)
            structure = _structure(body)
            filled = await server.text.beside(lambda: _filled(server, body))
            text = await server.text.beside(lambda: prompt_text(server.renderer, body, filled))
            [tokens] = await server.text.encode([text], special=False)
            call = _Call(server, body, caller, server.text.check(tokens, "messages"), filled)
            sampling = fields.sampling_options(
                body,
                max_tokens=body.max_completion_tokens or body.max_tokens,
                logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                prompt_logprobs=body.prompt_logprobs,
                grammar=await server.grammar(structure),
                vocab_size=server.text.vocab_size,
            )
            feed = server.feed(caller, [call.prompt], sampling, stream)
            return await respond(http, feed, (lambda: call.chunks(feed)) if stream else None, lambda: call.whole(feed))

    return routes
