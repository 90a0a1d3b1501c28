"""What completions and chat completions report alike: usage, log probabilities, how an answer ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jora.serve.http.responses import (
    CachedTokens,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
    UsageBody,
)
from jora.serve.http.tokens import Text
from jora.serve.requests import Event, Logprobs

_LEAST = -9999.0  # JSON has no -inf; vLLM's number


def finite(logprob: float) -> float:
    return max(float(logprob), _LEAST)


@dataclass
class Collected:
    """One answer, whole."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    finish: str | None = None
    stopped_by: str | int | None = None

    def add(self, event: Event) -> None:
        self.text += event.text
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if event.finish is not None:
            self.finish, self.stopped_by = event.finish, event.stopped_by


class Tally:
    """Tokens of a request with several prompts and answers."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompt = sum(map(len, prompts))
        self.completion = 0
        self._cached = [0] * len(prompts)

    def add(self, position: int, event: Event) -> None:
        self.completion += len(event.tokens)
        self._cached[position] = max(self._cached[position], event.usage.cached)

    def usage(self) -> UsageBody:
        return UsageBody(
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            total_tokens=self.prompt + self.completion,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(self._cached)),
        )


def chat_logprobs(entries: Iterable[Logprobs], text: Text) -> list[TokenLogprob]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text.token_text(token), "logprob": finite(logprob), "bytes": list(text.token_bytes(token))}

    return [
        TokenLogprob(**one(entry.token, entry.logprob), top_logprobs=[TopLogprob(**one(*top)) for top in entry.top])
        for entry in entries
    ]


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[Logprobs | None], text: Text, count: int, offset: int
) -> CompletionLogprobs:
    """offset: characters of the choice's text before these tokens; count: alternatives to report."""
    pieces = [text.token_text(token) for token in tokens]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    return CompletionLogprobs(
        tokens=pieces,
        token_logprobs=[None if entry is None else finite(entry.logprob) for entry in entries],
        top_logprobs=[None if entry is None else _alternatives(entry, text, count) for entry in entries],
        text_offset=offsets,
    )


def _alternatives(entry: Logprobs, text: Text, count: int) -> dict[str, float]:
    listed = [*entry.top[:count], (entry.token, entry.logprob)]
    return {text.token_text(token): finite(logprob) for token, logprob in listed}


def prompt_logprobs_body(entries: Sequence[Logprobs | None], text: Text, count: int) -> PromptLogprobs:
    """vLLM's shape: for each token of the prompt, the token and the likeliest by their ids."""

    def one(token: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text.token_text(token)}

    found: PromptLogprobs = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        listed = {str(token): one(token, value, at) for at, (token, value) in enumerate(entry.top[:count], start=1)}
        listed[str(entry.token)] = one(entry.token, entry.logprob, entry.rank)
        found.append(listed)
    return found
