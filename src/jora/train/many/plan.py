"""Which jobs share arrays, which rows are whose, and which programs the run needs.

Everything here follows from the jobs alone. Programs are compiled for what the run will meet if no job ends
before its time; where one does, a step runs the smallest of them that holds what is left.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jora.data.batches import FEW_STEPS, LENGTH_GROWTH, Batches, Shape
from jora.methods.bank import Bank, Kind
from jora.methods.lora import LoRA
from jora.methods.method import Method, State
from jora.models.model import Model
from jora.train.feed import Schedule
from jora.train.many.jobs import Job

FEWER_ROWS = 0.75  # a program without the kinds that have ended must save at least a quarter of the rows


@dataclass(frozen=True)
class Prepared:
    """A job with its data in batches."""

    job: Job
    batches: Batches
    evaluation: Batches | None
    schedule: Schedule
    identity: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows of one of its optimiser steps."""
        return self.job.options.batch_size * self.job.options.accumulation


class Group(NamedTuple):
    """The jobs of one kind, in the order in which they take its places."""

    kind: Kind
    jobs: tuple[int, ...]  # numbers in the list of jobs


class Planned(NamedTuple):
    """What the jobs of a step need: the kinds that have a running job, row length, answers a row."""

    kinds: tuple[int, ...]
    length: int
    answers: int


def micro_batches(prepared: Sequence[Prepared]) -> int:
    """Micro-batches of every step: a job's rows are spread evenly over them."""
    return max(each.job.options.accumulation for each in prepared)


def group_jobs(prepared: Sequence[Prepared], model: Model, at_once: int | None) -> list[Group]:
    """Jobs whose arrays have equal shapes share them, up to `at_once` at a time."""
    parts, shards = micro_batches(prepared), model.layout.batch_shards
    found: dict[Any, list[int]] = {}
    for number, each in enumerate(prepared):
        rows = math.ceil(each.rows / (parts * shards))  # on a device, in a micro-batch
        found.setdefault((_likeness(each.job.method, model), rows), []).append(number)
    return [
        Group(Kind(prepared[members[0]].job.method, min(len(members), at_once or len(members)), rows), tuple(members))
        for (_, rows), members in found.items()
    ]


def _likeness(method: Method, model: Model) -> Any:
    """Equal for methods that one `bind` serves. LoRA's ranks are shapes and its scales arrays; others are alike
    only where all of their options are."""
    if type(method) is not LoRA:
        return method
    sizes: dict[str, Any] = {"rank": 2, "rank_pattern": {}, "init_lora_weights": True}
    scales: dict[str, Any] = {"alpha": 1.0, "alpha_pattern": {}, "use_rslora": False}
    sites: dict[str, Any] = {"targets": "all-linear", "exclude_modules": (), "layers_to_transform": None}
    alike = dataclasses.replace(method, **sizes, **scales, **sites)
    return alike, _shapes(abstract_state(method, model))


def _shapes(state: State) -> Any:
    return tuple((jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(state))


def abstract_state(method: Method, model: Model) -> State:
    """Shapes and dtypes of one job's arrays."""
    shapes = model.abstract()
    return jax.eval_shape(lambda key: method.init(shapes, key).state, jax.random.key(0))


def bank_of(groups: Sequence[Group], kinds: Iterable[int], shards: int) -> Bank:
    """The bank of some of the kinds."""
    return Bank(tuple(groups[k].kind for k in kinds), shards)


def _steps_without_surprises(groups: Sequence[Group], prepared: Sequence[Prepared]) -> Iterator[Planned]:
    """What each step of the run needs where every job lasts as long as planned."""
    waiting = [list(group.jobs) for group in groups]
    places: list[list[tuple[int, int] | None]] = [[None] * group.kind.jobs for group in groups]  # (job, its step)
    while True:
        shapes: list[tuple[int, Shape]] = []
        for k, row in enumerate(places):
            for place, holder in enumerate(row):
                if holder is None and waiting[k]:
                    holder = (waiting[k].pop(0), 0)
                if holder is not None:
                    job, step = holder
                    shapes.append((k, prepared[job].schedule.step(step)[1].shape))
                    holder = None if step + 1 == prepared[job].schedule.total else (job, step + 1)
                row[place] = holder
        if not shapes:
            return
        kinds = tuple(sorted({k for k, _ in shapes}))
        yield Planned(kinds, max(s.length for _, s in shapes), max(s.answers for _, s in shapes))


def choose_programs(groups: Sequence[Group], prepared: Sequence[Prepared]) -> list[Planned]:
    """The programs to compile, the largest first: it holds whatever any step can need."""
    needs = Counter(_steps_without_surprises(groups, prepared))

    def rows(kinds: Iterable[int]) -> int:
        return sum(groups[k].kind.jobs * groups[k].kind.rows for k in kinds)

    # Kinds end one after another, so what is left shrinks: keep what is worth its compilation.
    uses: Counter[tuple[int, ...]] = Counter()
    for need, times in needs.items():
        uses[need.kinds] += times
    every = tuple(range(len(groups)))
    sets = [every]
    for kinds in sorted(uses, key=rows, reverse=True):
        if uses[kinds] >= FEW_STEPS and rows(kinds) <= FEWER_ROWS * rows(sets[-1]) and set(kinds) <= set(sets[-1]):
            sets.append(kinds)
    chosen = []
    for kinds in sets:
        held = {n: t for n, t in needs.items() if next(s for s in reversed(sets) if set(n.kinds) <= set(s)) == kinds}
        chosen += [Planned(kinds, *size) for size in _sizes(held, _largest(groups, prepared, kinds))]
    return chosen


def _largest(groups: Sequence[Group], prepared: Sequence[Prepared], kinds: Iterable[int]) -> tuple[int, int]:
    shapes = [s for k in kinds for job in groups[k].jobs for s in prepared[job].schedule.shapes]
    return max(s.length for s in shapes), max(s.answers for s in shapes)


def _sizes(needs: dict[Planned, int], largest: tuple[int, int]) -> list[tuple[int, int]]:
    """(row length, answers) of the programs of one set of kinds, the largest first."""
    sizes = [largest]
    for length in sorted({need.length for need in needs}, reverse=True):
        held = {need: times for need, times in needs.items() if need.length <= length}
        if length * LENGTH_GROWTH <= sizes[-1][0] and sum(held.values()) >= FEW_STEPS:
            sizes.append((length, max(need.answers for need in held)))
    return sizes


def smallest(programs: Iterable[Planned], need: Planned, groups: Sequence[Group]) -> Planned:
    """The cheapest program that holds `need`."""
    fits = [
        p for p in programs if set(need.kinds) <= set(p.kinds) and need.length <= p.length and need.answers <= p.answers
    ]
    return min(fits, key=lambda p: p.length * sum(groups[k].kind.jobs * groups[k].kind.rows for k in p.kinds))
