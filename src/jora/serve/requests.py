"""What a client asks of the engine, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jora.errors import InputError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
MAX_LOGPROBS = 20  # alternatives a token, as OpenAI's API allows


@dataclass(frozen=True)
class SamplingOptions:
    """How a request's tokens are chosen and when it ends, under vLLM's names.

    max_tokens: most new tokens; None is whatever the model's positions and the pool allow. min_tokens: EOS and stop
    tokens cannot be drawn before so many. temperature 0 is greedy; the filters are those of
    `jora.inference.sampling.Sampling`. presence_penalty and frequency_penalty count generated tokens (OpenAI),
    repetition_penalty prompt and generated tokens (arXiv 1909.05858). seed: None draws one. stop: the text ends before
    the first of these strings (behind it with include_stop). ignore_eos: only max_tokens, stop and stop_token_ids end
    it. logprobs: report each token's log probability and so many alternatives; prompt_logprobs the same of the prompt's
    tokens. n: independent answers. logit_bias: added to the logits of these tokens. grammar: see
    `jora.serve.text.grammar`.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Any = None

    def __post_init__(self) -> None:
        _at_least("max_tokens", self.max_tokens, 1)
        _at_least("min_tokens", self.min_tokens, 0)
        _at_least("top_k", self.top_k, 0)
        _at_least("n", self.n, 1)
        _within("temperature", self.temperature, 0.0, math.inf)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _within(name, value, 0, MAX_LOGPROBS)
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], found {self.top_p}")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0, found {self.repetition_penalty}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if any(not s for s in self.stop):
            raise InputError("stop: an empty string would end every answer at once")
        if any(not -100.0 <= bias <= 100.0 for bias in self.logit_bias.values()):
            raise InputError("logit_bias: values must be in [-100, 100]")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, found {value}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isinf(value):
        raise InputError(f"{name} must be in [{low}, {high}], found {value}")


@dataclass(frozen=True)
class Request:
    """One request: a prompt of tokens for the base or one adapter.

    adapter: its name in the adapter store, None for the base. client: whom fairness charges. deadline: on the
    engine's clock (`time.monotonic`, seconds); later than that the request is ended. streamed: its events are passed on
    as they come; an answer that is collected first can be begun anew where its engine is lost.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    adapter: str | None = None
    client: str = "default"
    deadline: float | None = None
    streamed: bool = True

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("the prompt is empty; give at least one token")

    def most_tokens(self, soft_tokens: int, positions: int, vocabulary: int) -> int:
        """Most new tokens of each answer, where the model has so many positions and its adapter so many soft tokens.

        Raises InputError where nothing is left for an answer, less than was asked for, or a token is none.
        """
        if wrong := [t for t in self.prompt if not 0 <= t < vocabulary]:
            raise InputError(f"the prompt has token {wrong[0]}; the vocabulary has {vocabulary}")
        room = positions - soft_tokens - len(self.prompt)
        if room < 1:
            taken = f"{len(self.prompt)} tokens" + (f" and {soft_tokens} soft tokens" if soft_tokens else "")
            raise InputError(f"the prompt has {taken}, which leaves none of {positions} positions to the answer")
        asked = self.sampling.max_tokens
        if asked is not None and asked > room:
            raise InputError(
                f"max_tokens {asked} and a prompt of {len(self.prompt)} tokens are more than {positions} positions;"
                " ask for fewer"
            )
        return room if asked is None else asked


class Logprobs(NamedTuple):
    """Natural-log probabilities at one position: the token's own, and the likeliest tokens', best first."""

    token: int
    logprob: float
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...]


class Usage(NamedTuple):
    """Tokens of a request so far; `cached` are prompt tokens that the prefix cache held."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


NOTHING_USED = Usage()


@dataclass(frozen=True)
class Event:
    """News of one answer of a request: new tokens and text, and how it ended if it did.

    text: what is new and settled (never half a character, never the beginning of a possible stop string).
    prompt_logprobs: with an answer's first event, one entry a prompt token (the first has none). error: for the
    finish reason "error", one line.
    """

    request: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    finish: FinishReason | None = None
    stopped_by: str | int | None = None  # the stop string or stop token that ended it
    usage: Usage = NOTHING_USED
    error: str | None = None


class Rejected(InputError):
    """The engine cannot take a request now; try again after `retry_after` seconds (HTTP 429)."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class UnknownAdapter(InputError):
    """No adapter of this name is served (HTTP 404)."""
