"""Counts what devices exchange in a compiled program, from its text."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jora.methods.method import Adapter, Method, State
from jora.models.adapted import Bound

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\((.*)")
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One exchange: its kind, and the result on one device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * int(re.sub(r"\D", "", self.dtype) or 8) // 8


def collectives(text: str) -> Counter[Collective]:
    """How often each collective runs, loops multiplied out; combined ones are counted part by part.

    `text` is `Compiled.as_text()`. Groups of a single device exchange nothing and are left out.
    """
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if (opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)) is not None:
            lines = bodies.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        else:
            lines.append(line)
    found: Counter[Collective] = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies[name]:
            if (match := _COLLECTIVE.search(line)) is not None and not _alone(match[3]):
                for dtype, shape in _SHAPE.findall(match[1]):
                    sizes = tuple(int(size) for size in shape.split(",") if size)
                    found[Collective(match[2], dtype, sizes)] += times
            trips = _TRIPS.search(line)
            for role, called in re.findall(r"\b(body|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", line):
                loops = int(trips[1]) if role == "body" and trips else 1
                if role != "to_apply" or " call(" in line:
                    for name in re.findall(r"[\w.\-]+", called):
                        walk(name, times * loops)

    walk(entry, 1)
    return found


def _alone(attributes: str) -> bool:
    """Whether every replica group has one member: {{0},{1}} or, as a list, [8,1]<=[8]."""
    listed = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if listed is not None:
        return listed[2] == "1"
    return re.search(r"replica_groups=\{(\{\d+\},?)+\}", attributes) is not None


def in_loops(text: str) -> int:
    """Loops whose number of rounds the compiler does not know: their collectives would be counted once."""
    return sum(" while(" in line and _TRIPS.search(line) is None for line in text.splitlines())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Shift:
    vector: Any

    def embed(self, tokens: Any, vectors: Any) -> Any:
        return vectors + self.vector


@dataclass(frozen=True)
class Probe(Method):
    """The program without an adapter: one vector added to all embeddings trains, so that gradients flow back
    through every layer."""

    name = "probe"

    def init(self, model: Any, key: Any) -> Adapter:
        return Adapter(self, State({"vector": jnp.zeros(model.config.embed)}, {}), model.config)

    def axes(self, config: Any) -> State:
        return State({"vector": (None,)}, {})

    def bind(self, state: State, rows: Any) -> Bound:
        return Bound(embed=_Shift(state.trained["vector"]))
