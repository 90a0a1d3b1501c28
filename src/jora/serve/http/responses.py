"""The bodies of answers. Written with `exclude_unset`: what an answer does not have is not in it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "tool_calls"]
PromptLogprobs = list[dict[str, dict[str, Any]] | None]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Part):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Part):
    error: ErrorDetail


class CachedTokens(Part):
    cached_tokens: int


class UsageBody(Part):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ModelCard(Part):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    rank: int | None = None
    method: str | None = None


class ModelList(Part):
    object: Literal["list"]
    data: list[ModelCard]


class CompletionLogprobs(Part):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Part):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Part):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None


class TopLogprob(Part):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Part):
    content: list[TokenLogprob]
    refusal: None


class FunctionBody(Part):
    name: str | None = None
    arguments: str


class ToolCall(Part):
    index: int | None = None  # in chunks
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionBody


class AnswerMessage(Part):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None
    citations: list[dict[str, Any]] | None = None


class ChatChoice(Part):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    stop_reason: str | int | None = None


class ChatCompletion(Part):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_logprobs: PromptLogprobs | None = None
    documents: list[dict[str, Any]] | None = None


class Delta(Part):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    citations: list[dict[str, Any]] | None = None


class ChunkChoice(Part):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None = None


class ChatChunk(Part):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
    documents: list[dict[str, Any]] | None = None


class Tokens(Part):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Part):
    prompt: str


class Status(Part):
    status: str


class Version(Part):
    version: str
