"""What the HTTP process and the replicas say to each other, beside `Request` and `Event`.

Ray carries these objects pickled between its own processes. No byte that a client sent and no file is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jora.errors import InputError
from jora.serve.memory import Memory
from jora.serve.requests import Rejected, UnknownAdapter
from jora.serve.text.grammar import Grammars, Kind


class EngineLost(RuntimeError):
    """The engine of a replica has stopped for good: another one may do what it was asked."""


@dataclass(frozen=True)
class Refused:
    """An InputError of the engine: a value, because Ray wraps exceptions and some cannot be pickled."""

    kind: Literal["input", "unknown", "rejected"]
    message: str
    retry_after: float = 0.0

    @staticmethod
    def of(error: InputError) -> Refused:
        if isinstance(error, Rejected):
            return Refused("rejected", str(error), error.retry_after)
        return Refused("unknown" if isinstance(error, UnknownAdapter) else "input", str(error))

    def error(self) -> InputError:
        """The exception that this was."""
        if self.kind == "rejected":
            return Rejected(self.message, self.retry_after)
        return UnknownAdapter(self.message) if self.kind == "unknown" else InputError(self.message)


class Change(NamedTuple):
    """What was done last to an adapter's name. number: rises with every change. path: None where it was unloaded."""

    number: int
    path: str | None


class Facts(NamedTuple):
    """What the HTTP process needs to know of the model, which only replicas load."""

    max_length: int
    vocab_size: int
    ends: tuple[int, ...]
    memory: Memory


class GrammarSource(NamedTuple):
    """A grammar on its way to a replica; `Grammar` holds a matcher of llguidance, which stays in its process."""

    kind: Kind
    text: str


class CheckedGrammars(Grammars):
    """Refuses grammars that cannot be used, and gives the others to be compiled by the replica."""

    def compile(self, kind: Kind, text: str = "") -> Any:
        """A GrammarSource. Raises InputError."""
        super().compile(kind, text)
        return GrammarSource(kind, text)
