"""The rows of all jobs as one batch on the devices (for their order see `methods.bank`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jora.data.batches import Batch, Shape
from jora.methods.bank import Bank
from jora.train.many.plan import Planned, Prepared


class JobRows(NamedTuple):
    """What a job puts into a step."""

    rows: Batch  # [m * n, ...], of the batch's row length
    epoch: int
    tokens: int  # without padding
    answer_tokens: int


def job_rows(prepared: Prepared, step: int, size: Planned) -> JobRows:
    """The rows of a job's own step number `step`, padded to the batch's row length and answers."""
    epoch, planned = prepared.schedule.step(step)
    shape = Shape(prepared.job.options.batch_size, size.length, size.answers)
    parts = prepared.batches.build(planned._replace(shape=shape))
    rows = Batch(*(np.concatenate(field) for field in zip(*parts, strict=True)))
    return JobRows(rows, epoch, int(np.count_nonzero(rows.segments)), int(rows.answer_weights.sum()))


def assemble(jobs: Mapping[int, Batch], bank: Bank, parts: int, size: Planned) -> list[Batch]:
    """`parts` micro-batches from the rows of each place of the bank (a place that is not named is empty)."""
    places = [(kind.jobs, kind.rows) for kind in bank.kinds]
    empty = Batch(*(np.zeros((0, *tail), dtype) for tail, dtype in _fields(size)))
    columns: list[list[np.ndarray]] = [[] for _ in Batch._fields]
    place = 0
    for count, rows in places:
        for _ in range(count):
            batch = jobs.get(place, empty)
            for column, values in zip(columns, batch, strict=True):
                column.append(_spread(values, parts, bank.shards, rows))
            place += 1
    whole = [np.concatenate(column, axis=2).reshape(parts, -1, *column[0].shape[3:]) for column in columns]
    return [Batch(*(values[part] for values in whole)) for part in range(parts)]


def _fields(size: Planned) -> Sequence[tuple[tuple[int, ...], Any]]:
    s, n = (size.length,), (size.answers,)
    ints, floats = np.int32, np.float32
    return ((s, ints), (s, ints), (s, ints), (n, ints), (n, ints), (n, floats), ((), ints))


def _spread(values: np.ndarray, parts: int, shards: int, rows: int) -> np.ndarray:
    """A job's rows as [micro-batches, devices, rows, ...], filled up with padding."""
    missing = parts * shards * rows - len(values)
    padded = np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])
    return padded.reshape(parts, shards, rows, *values.shape[1:])
