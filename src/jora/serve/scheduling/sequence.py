"""The host's state of one answer that is being made."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jora.serve.requests import Request

State = Literal["waiting", "loading", "prefill", "running", "finished"]


class AdapterVersion(NamedTuple):
    """One adapter as it was when it was loaded: loading the name again makes a new version."""

    name: str
    version: int


@dataclass(eq=False)
class Sequence:
    """One answer of a request (`index` of n), mutable; two are equal only if they are the same object.

    Positions count soft-prompt slots (`prefix_slots`) first, then tokens. `tokens` are those that the host knows, so
    one fewer than have been dispatched while a step is in flight; `computed` counts by dispatch. `max_tokens` is
    resolved: prompt, slots and it fit the model's positions. `salt`: bytes on which the soft prompt depends beyond the
    adapter's version (LoPA's instance), part of the prefix cache's key. `epoch` rises at each preemption: a token
    that was dispatched in an earlier epoch is not this sequence's any more, drop it.
    """

    request: Request
    index: int
    adapter: AdapterVersion | None
    max_tokens: int
    prefix_slots: int = 0
    salt: bytes = b""
    arrival: float = 0.0
    number: int = 0  # of its arrival: its place in the queue
    tokens: list[int] = field(default_factory=list)
    prompt_length: int = 0
    computed: int = 0  # positions whose keys and values are in the pool, by dispatch
    cached: int = 0  # prompt tokens that the prefix cache held when it was first admitted
    slot: int | None = None  # row of the decode batch, from admission on
    tables: list[list[int]] = field(default_factory=list)  # a page a block, a list a group; 0 where returned
    held_from: list[int] = field(default_factory=list)  # first block still held, by group
    shared: int = 0  # its pages of full groups that other sequences use too
    state: State = "waiting"
    first_token: float | None = None
    admitted: float | None = None  # when it was first admitted
    order: int | None = None  # its number among admissions; preemption keeps it
    epoch: int = 0
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its leading full blocks
    ready: bool = True  # False while its soft prompt is being made
    cacheable: bool = True  # False once its adapter is unloaded: nothing may hit its blocks
    overtaken: int = 0  # requests of running adapters that went before it (clustering)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt)
            self.prompt_length = len(self.tokens)

    @property
    def length(self) -> int:
        """Positions that the host knows: soft-prompt slots, prompt and generated tokens."""
        return self.prefix_slots + len(self.tokens)

    @property
    def limit(self) -> int:
        """Most positions with keys and values in the pool: the last token's are never computed."""
        return self.prefix_slots + self.prompt_length + self.max_tokens - 1

    @property
    def generated(self) -> int:
        """New tokens that the host knows."""
        return len(self.tokens) - self.prompt_length

    @property
    def owner(self) -> Hashable:
        """Whose its pages are in the allocator."""
        return ("kv", (self.request.id, self.index))

    @property
    def client(self) -> str:
        """Whom fairness charges."""
        return self.request.client
