"""Emit: from the tokens of one answer to its events - text, stops, log probabilities, and how it ends."""

from __future__ import annotations

from collections.abc import Collection

from jora.serve.requests import Event, FinishReason, Logprobs, Request, Usage
from jora.serve.text.detokenise import Detokeniser, TextStream


class Answer:
    """One of the n answers to a request: it takes tokens as the device chose them and says what is new.

    ends: tokens that end the model's turn. max_tokens: of this answer, resolved against the model's positions.
    """

    def __init__(self, request: Request, index: int, detokeniser: Detokeniser, ends: Collection[int], max_tokens: int):
        self.request, self.index, self.max_tokens = request, index, max_tokens
        sampling = request.sampling
        self._ends = frozenset() if sampling.ignore_eos else frozenset(ends)
        self._stops = frozenset(sampling.stop_token_ids)
        self._text = TextStream(detokeniser, sampling.stop, sampling.include_stop, sampling.min_tokens)
        self.grammar = None if sampling.grammar is None else sampling.grammar.start()
        self.count = 0
        self.cached = 0
        self.finished = False
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(len(self.request.prompt), self.cached, self.count)

    def keep_prompt_logprobs(self, found: tuple[Logprobs | None, ...]) -> None:
        """Send these with the first event."""
        self._prompt_logprobs = found

    def take(self, token: int, logprobs: Logprobs | None) -> Event:
        """The event of one more token."""
        self.count += 1
        if token in self._ends:
            return self._last(token, "", logprobs, "stop")
        if token in self._stops:
            return self._last(token, "", logprobs, "stop", token)
        if self.grammar is not None:
            self.grammar.advance(token)
        delta = self._text.push(token)
        if self._text.stopped_by is not None:
            return self._event((token,), delta, logprobs, "stop", self._text.stopped_by)
        if self.grammar is not None and self.grammar.finished:
            return self._last(token, delta, logprobs, "stop")
        if self.count >= self.max_tokens:
            return self._last(token, delta, logprobs, "length")
        return self._event((token,), delta, logprobs, None)

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """The last event of an answer that something else ends: a cancellation, a deadline, an error."""
        return self._event((), self._text.finish(), None, reason, error=error)

    def _last(
        self, token: int, delta: str, logprobs: Logprobs | None, finish: FinishReason, stopped_by: int | None = None
    ) -> Event:
        """What was held back goes with it; where that completes a stop string, the string ends the answer."""
        text, found = delta + self._text.finish(), self._text.stopped_by
        if found is not None:
            return self._event((token,), text, logprobs, "stop", found)
        return self._event((token,), text, logprobs, finish, stopped_by)

    def _event(
        self,
        tokens: tuple[int, ...],
        text: str,
        logprobs: Logprobs | None,
        finish: FinishReason | None,
        stopped_by: str | int | None = None,
        error: str | None = None,
    ) -> Event:
        self.finished = finish is not None
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return Event(
            self.request.id,
            self.index,
            tokens,
            text,
            () if logprobs is None else (logprobs,),
            prompt_logprobs,
            finish,
            stopped_by,
            self.usage,
            error,
        )
