"""What a step's programs gave, as the host reads it a step later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jora.serve.device import sampling
from jora.serve.device.programs import PromptScores
from jora.serve.requests import Logprobs
from jora.serve.scheduling.sequence import Sequence as Answering


class Sampled(NamedTuple):
    """A new token of a sequence, as it was when the token was dispatched (see `Sequence.epoch`)."""

    sequence: Answering
    epoch: int
    token: int
    logprobs: Logprobs | None


class Scored(NamedTuple):
    """Log probabilities of some of a prompt's tokens, in order."""

    sequence: Answering
    epoch: int
    found: list[Logprobs]


@dataclass(frozen=True)
class Pending:
    """Results of one step that the host has not read."""

    rows: list[tuple[Answering, int, int]]  # sequence, its epoch and its row
    tokens: sampling.Sampled | None
    first: tuple[Answering, int] | None
    first_token: sampling.Sampled | None
    scored: tuple[Answering, int, range] | None  # sequence, epoch, positions of the chunk
    scores: PromptScores | None

    def read(self) -> tuple[list[Scored], list[Sampled]]:
        """Wait for the devices."""
        sampled = []
        if self.tokens is not None:
            host = _Host.of(self.tokens)
            sampled += [Sampled(s, epoch, *host.at(row, s)) for s, epoch, row in self.rows]
        if self.first is not None and self.first_token is not None:
            sampled.append(Sampled(*self.first, *_Host.of(self.first_token).at(0, self.first[0])))
        return self._scored(), sampled

    def _scored(self) -> list[Scored]:
        if self.scored is None or self.scores is None:
            return []
        sequence, epoch, positions = self.scored
        wanted = sequence.request.sampling.prompt_logprobs or 0
        host = _Host(*(np.asarray(x) for x in self.scores))
        return [Scored(sequence, epoch, [host.logprobs(i, wanted) for i in positions])]


class _Host(NamedTuple):
    """Sampled tokens, or scored ones, on the host."""

    token: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    top: np.ndarray
    top_logprobs: np.ndarray

    @classmethod
    def of(cls, sampled: sampling.Sampled) -> _Host:
        return cls(*(np.asarray(x) for x in sampled))

    def at(self, row: int, sequence: Answering) -> tuple[int, Logprobs | None]:
        wanted = sequence.request.sampling.logprobs
        return int(self.token[row]), None if wanted is None else self.logprobs(row, wanted)

    def logprobs(self, row: int, wanted: int) -> Logprobs:
        top = zip(self.top[row, :wanted].tolist(), self.top_logprobs[row, :wanted].tolist(), strict=True)
        return Logprobs(int(self.token[row]), float(self.logprob[row]), int(self.rank[row]), tuple(top))
