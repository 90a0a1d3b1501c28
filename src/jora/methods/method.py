"""What an adapter method is, and the Adapter that users hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from jaxtyping import Array

from jora.models.adapted import Bound, Rows
from jora.models.config import ModelConfig

PyTree = Any


class State(NamedTuple):
    """A method's arrays: what the optimiser moves, and what it must not (scales, seeds, random bases)."""

    trained: PyTree
    constant: PyTree


class Method(Protocol):
    """An adapter method: a frozen, hashable dataclass of options."""

    name: ClassVar[str]
    identity: ClassVar[Literal["exact", "rounding", "no"]]  # does step 0 compute what the base computes?

    def init(self, model: Any, key: Array) -> Adapter:
        """A fresh adapter for `model`, laid out on its devices."""
        ...

    def axes(self, config: ModelConfig) -> State:
        """Logical axes, leaf for leaf like the state."""
        ...

    def bind(self, state: State, rows: Rows) -> Bound:
        """The projections of one step, inside jit."""
        ...


@dataclass(frozen=True)
class Adapter:
    """A method with its state, for models of one config; `base` identifies the one it was made for."""

    method: Any
    state: State
    config: ModelConfig
    base: Mapping[str, str] = field(default_factory=dict)
