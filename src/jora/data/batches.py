"""Padded batches of a few known shapes, in an order that is a pure function of the run's options.

There is no iterator state and hence no grain: the plan of an epoch follows from (lengths, options,
seed, epoch), so the data position in a checkpoint is the step number and resuming is exact.

A *row* holds one example (length buckets) or several (packing); a *micro-batch* is what goes through
the model at once; a *step* is one update of the optimiser, `accumulation` micro-batches of one shape.

Shape legend: b rows of a micro-batch, s tokens of a row, n answer positions of a row.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from jora.data.draws import permutation
from jora.errors import InputError

LENGTH_GROWTH = 1.5  # a length bucket is at most this much longer than the one below it
ANSWER_BUCKETS = tuple(k << e for e in range(24) for k in (16, 24))  # 16, 24, 32, 48, 64, 96, ...
FEW_STEPS = 20  # a shape that fewer steps of an epoch use is not worth its compilation

Row = tuple[int, ...]  # indices of the examples that share a row, in their order


class Tokenised(NamedTuple):
    """One example. `loss[i]` says that token i is a target: assistant tokens and the turn's end token.

    The first token has nothing before it that could predict it, so `loss[0]` has no effect.
    """

    tokens: Int32[np.ndarray, " t"]
    loss: Bool[np.ndarray, " t"]


class Batch(NamedTuple):
    """One micro-batch, all numpy. Padding has segment 0, and weight 0 where it stands for an answer.

    A row that exists only to fill the batch is padding altogether; attention has to bear that.
    """

    tokens: Int32[np.ndarray, "b s"]
    positions: Int32[np.ndarray, "b s"]  # restart at 0 with every example
    segments: Int32[np.ndarray, "b s"]  # 0 padding, 1.. the example within the row
    answer_positions: Int32[np.ndarray, "b n"]  # index into s of the token that predicts the target
    answer_targets: Int32[np.ndarray, "b n"]
    answer_weights: Float32[np.ndarray, "b n"]
    row_ids: Int32[np.ndarray, " b"]  # index of the row in the step, whatever the mesh and accumulation


class Shape(NamedTuple):
    """Shape of a micro-batch: `rows` = b, `length` = s, `answers` = n."""

    rows: int
    length: int
    answers: int


class Step(NamedTuple):
    """One optimiser step of the plan: the rows of all micro-batches in order, fewer only in a last step."""

    shape: Shape
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class BatchOptions:
    """How examples become batches.

    Attributes:
        rows: rows of a micro-batch (before padding to `row_multiple`).
        accumulation: micro-batches of one optimiser step.
        max_length: most tokens of a row, prompt slots included; a longer example is an error here (see
            `chat.tokenise`).
        multiple: row lengths are multiples of this (the sequence is sharded over `tensor`).
        packing: several examples share a row, kept apart by segments.
        length_buckets: number of row lengths without packing.
        row_multiple: rows are padded to a multiple of this with rows that carry no loss, so that the
            mesh divides them.
        shuffle: a new order every epoch; off, the order of the file within each length (evaluation).
        window: packing looks for neighbours among this many examples at a time.
        prompt_slots: positions left free in front of each example, for a method's own vectors.
    """

    rows: int = 8
    accumulation: int = 1
    max_length: int = 2048
    multiple: int = 8
    packing: bool = False
    length_buckets: int = 3
    row_multiple: int = 1
    shuffle: bool = True
    window: int = 1024
    prompt_slots: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value < 1 and not isinstance(value, bool) and option.name != "prompt_slots":
                raise InputError(f"batch option {option.name} is {value}: it must be at least 1")
        if self.packing and self.prompt_slots:
            raise InputError("packing puts several examples in a row, a soft prompt needs a row each: turn packing off")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def length_buckets(lengths: Sequence[int], options: BatchOptions) -> list[int]:
    """Row lengths in ascending order, the last that of the longest example.

    They grow by the same factor (at most 1.5) from the shortest example to the longest.
    """
    if options.packing:
        return [_round_up(options.max_length, options.multiple)]
    top = max(lengths)
    growth = min(LENGTH_GROWTH, (top / min(lengths)) ** (1 / options.length_buckets))
    sizes = {math.ceil(top / growth**level) for level in range(options.length_buckets)}
    return sorted({_round_up(size, options.multiple) for size in sizes})


def answer_bucket(answers: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds so many answer tokens of a row."""
    return ANSWER_BUCKETS[bisect_left(ANSWER_BUCKETS, answers)]


def _bucketed_steps(lengths: Sequence[int], order: Sequence[int], options: BatchOptions) -> list[tuple[int, list[Row]]]:
    """Steps of (row length, rows).

    What does not fill a step moves up a bucket, so only one step is short; so does a bucket of few steps.
    """
    buckets = length_buckets(lengths, options)
    members: list[list[Row]] = [[] for _ in buckets]
    for example in order:
        members[bisect_left(buckets, lengths[example])].append((example,))
    size = options.rows * options.accumulation
    steps = []
    carried: list[Row] = []
    for bucket, rows in zip(buckets, members, strict=True):
        rows = carried + rows
        full = len(rows) - len(rows) % size
        if full < FEW_STEPS * size and bucket != buckets[-1]:
            full = 0
        steps += [(bucket, rows[i : i + size]) for i in range(0, full, size)]
        carried = rows[full:]
    if carried:
        steps.append((buckets[-1], carried))
    return steps


def _first_fit_decreasing(lengths: Sequence[int], examples: Sequence[int], capacity: int) -> list[Row]:
    by_length = sorted(examples, key=lambda example: -lengths[example])  # ties keep the shuffled order
    rows: list[list[int]] = []
    room = np.zeros(len(by_length), np.int64)
    for example in by_length:
        fits = room[: len(rows)] >= lengths[example]
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = capacity
        rows[row].append(example)
        room[row] -= lengths[example]
    return [tuple(row) for row in rows]


def _packed_steps(
    lengths: Sequence[int], order: Sequence[int], options: BatchOptions, key: tuple[int, ...]
) -> list[tuple[int, list[Row]]]:
    (capacity,) = length_buckets(lengths, options)
    rows: list[Row] = []
    for start in range(0, len(order), options.window):
        rows += _first_fit_decreasing(lengths, order[start : start + options.window], capacity)
    if options.shuffle:  # the packer leaves long examples first
        rows = [rows[i] for i in permutation(len(rows), *key)]
    size = options.rows * options.accumulation
    return [(capacity, rows[i : i + size]) for i in range(0, len(rows), size)]


def _answer_sizes(steps: Sequence[tuple[int, list[Row]]], answers: Sequence[int]) -> list[int]:
    """Answer positions per row of each step; sizes that few steps use are merged into the next larger."""
    sizes = [answer_bucket(max(sum(answers[e] for e in row) for row in rows)) for _, rows in steps]
    for length in {length for length, _ in steps}:
        uses = Counter(n for n, (step_length, _) in zip(sizes, steps, strict=True) if step_length == length)
        ladder = sorted(uses)
        for small, larger in pairwise(ladder):
            if uses[small] < FEW_STEPS:
                uses[larger] += uses[small]
                sizes = [
                    larger if n == small and step_length == length else n
                    for n, (step_length, _) in zip(sizes, steps, strict=True)
                ]
    return sizes


def plan_epoch(
    lengths: Sequence[int], answers: Sequence[int], options: BatchOptions, seed: int, epoch: int
) -> list[Step]:
    """The steps of one epoch, in which every example occurs exactly once.

    Args:
        lengths: tokens of each example.
        answers: answer tokens of each example (those with loss).
        options: see `BatchOptions`.
        seed: the run's seed.
        epoch: from 0.
    """
    key = (seed, epoch)
    order = permutation(len(lengths), *key, 0).tolist() if options.shuffle else list(range(len(lengths)))
    if options.packing:
        steps = _packed_steps(lengths, order, options, (*key, 1))
    else:
        steps = _bucketed_steps(lengths, order, options)
        if options.shuffle:  # short and long rows alternate; a step that is not full stays the last
            full = sum(len(rows) == options.rows * options.accumulation for _, rows in steps)
            steps = [steps[i] for i in permutation(full, *key, 2)] + steps[full:]
    batch_rows = _round_up(options.rows, options.row_multiple)
    sizes = _answer_sizes(steps, answers)
    return [
        Step(Shape(batch_rows, length, size), tuple(rows)) for (length, rows), size in zip(steps, sizes, strict=True)
    ]


class Batches:
    """The batches of a data set, by epoch or by global step number (from 0).

    instances: a vector of each example's prompt, for methods that ask for one. Raises `InputError` where an example has
    more than `max_length` tokens or no token to learn.
    """

    def __init__(
        self,
        examples: Sequence[Tokenised],
        options: BatchOptions,
        seed: int = 0,
        instances: Float32[np.ndarray, "n h"] | None = None,
    ) -> None:
        if not examples:
            raise InputError("the data set holds no example: nothing is left to train or evaluate on")
        self.examples = examples
        self.options = options
        self.seed = seed
        self.instances = instances
        self.lengths = [options.prompt_slots + len(example.tokens) for example in examples]
        self.answers = [int(example.loss[1:].sum()) for example in examples]
        for index, (length, answers) in enumerate(zip(self.lengths, self.answers, strict=True)):
            if length > options.max_length:
                raise InputError(
                    f"example {index} has {length} tokens, more than max_length {options.max_length}: "
                    "raise max_length or let chat.tokenise shorten or drop it"
                )
            if answers == 0:
                raise InputError(f"example {index} has no token that carries loss: give it an answer")
        self._plan = lru_cache(maxsize=2)(
            lambda epoch: plan_epoch(self.lengths, self.answers, self.options, self.seed, epoch)
        )

    def plan(self, epoch: int) -> list[Step]:
        """The steps of an epoch (from 0)."""
        return self._plan(epoch)

    def total_steps(self, epochs: int) -> int:
        """Optimiser steps in `epochs` epochs. With packing, epochs may differ by a step or two."""
        return sum(len(self.plan(epoch)) for epoch in range(epochs))

    def shapes(self, epochs: int = 1) -> list[Shape]:
        """Every shape that occurs in `epochs` epochs, the largest first: what to compile ahead."""
        found = {step.shape for epoch in range(epochs) for step in self.plan(epoch)}
        return sorted(found, key=lambda shape: shape.rows * shape.length + shape.answers, reverse=True)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step number."""
        epoch = 0
        while step >= len(self.plan(epoch)):
            step -= len(self.plan(epoch))
            epoch += 1
        return epoch, step

    def step(self, number: int) -> list[Batch]:
        """The micro-batches of a global step, all of one shape."""
        epoch, index = self.locate(number)
        return self.build(self.plan(epoch)[index])

    def build(self, step: Step) -> list[Batch]:
        """The micro-batches of a planned step."""
        rows = self.options.rows
        starts = range(0, rows * self.options.accumulation, rows)
        return [
            _fill(self.examples, step.rows[start : start + rows], step.shape, start, self.options) for start in starts
        ]

    def instances_of(self, step: Step) -> Float32[np.ndarray, "m b h"] | None:
        """The vectors of a planned step's prompts, row for row as in `build`; 0 in rows that only fill."""
        if self.instances is None:
            return None
        found = np.zeros((self.options.accumulation, step.shape.rows, self.instances.shape[1]), np.float32)
        for number, (example,) in enumerate(step.rows):
            found[divmod(number, self.options.rows)] = self.instances[example]
        return found


def prompt_of(example: Tokenised) -> Int32[np.ndarray, " p"]:
    """The tokens before the first that carries loss; all of them where none does."""
    targets = np.flatnonzero(example.loss[1:])
    return example.tokens[: targets[0] + 1] if len(targets) else example.tokens


def _fill(
    examples: Sequence[Tokenised], rows: Sequence[Row], shape: Shape, first_row: int, options: BatchOptions
) -> Batch:
    b, s, n = shape
    tokens, positions, segments = (np.zeros((b, s), np.int32) for _ in range(3))
    answer_positions, answer_targets = (np.zeros((b, n), np.int32) for _ in range(2))
    answer_weights = np.zeros((b, n), np.float32)
    for r, row in enumerate(rows):
        start = used = 0
        for segment, index in enumerate(row, start=1):
            example = examples[index]
            first = start + options.prompt_slots
            end = first + len(example.tokens)
            tokens[r, first:end] = example.tokens
            positions[r, start:end] = np.arange(end - start)
            segments[r, start:end] = segment
            targets = np.flatnonzero(example.loss[1:]) + 1
            span = slice(used, used + len(targets))
            answer_positions[r, span] = first + targets - 1
            answer_targets[r, span] = example.tokens[targets]
            answer_weights[r, span] = 1.0
            start, used = end, span.stop
    # Rows added for the mesh are numbered after all others: real rows keep their number on any mesh.
    own = np.arange(first_row, first_row + options.rows)
    added = b - options.rows
    micro_batch = first_row // options.rows
    after = options.rows * options.accumulation + micro_batch * added + np.arange(added)
    row_ids = np.concatenate([own, after]).astype(np.int32)
    return Batch(tokens, positions, segments, answer_positions, answer_targets, answer_weights, row_ids)
