"""What a run of many jobs writes down: its config.yaml, each job's progress in a checkpoint, results.json."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jora.errors import InputError
from jora.files import atomic_write
from jora.methods.storage import method_options
from jora.models.model import Model
from jora.models.source import read_json
from jora.train.checkpoints import Checkpoints, Progress
from jora.train.many.jobs import SHARED, Job, ManyOptions
from jora.train.metrics import Line
from jora.train.record import CONFIG, model_values, write_values

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
RESULTS = "results.json"


@dataclass
class JobProgress:
    """Where a job is. `place`: its place in its kind while it runs. `step`: its finished optimiser steps."""

    status: Status = "waiting"
    place: int | None = None
    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    reason: str | None = None  # why it failed


@dataclass
class BankProgress(Progress):
    """What the run knows beside its arrays; `step` counts steps of the whole, the others are not used."""

    jobs: dict[str, JobProgress] = field(default_factory=dict)


class BankCheckpoints(Checkpoints):
    """Checkpoints of all jobs at once."""

    def read_progress(self, step: int) -> BankProgress:
        """The JSON part of a checkpoint. Raises InputError where it is not one of this version's."""
        path = self.path(step) / "run.json"
        values = read_json(path)
        try:
            jobs = {name: JobProgress(**job) for name, job in values.pop("jobs").items()}
            return BankProgress(**values, jobs=jobs)
        except (TypeError, KeyError):
            raise InputError(f"{path}: written by another version of jora: start anew in another directory") from None


@dataclass(frozen=True)
class JobResult:
    """What became of a job.

    Attributes:
        status: "finished", "stopped" (its evaluations got no better) or "failed".
        steps: its finished optimiser steps.
        history: the lines of its metrics.jsonl.
        directory: like that of `jora.train`, without checkpoints; a failed job has no adapter/ there.
        best_step, best_loss: of its best evaluation, whose adapter is the result; None without one.
        reason: why it failed, else None.
    """

    name: str
    status: Status
    steps: int
    history: list[Line]
    directory: Path
    best_step: int | None = None
    best_loss: float | None = None
    reason: str | None = None


def write_results(directory: Path, results: Sequence[JobResult]) -> None:
    """results.json: a line of numbers a job."""
    found = {}
    for result in results:
        last = next((line["loss"] for line in reversed(result.history) if "loss" in line), None)
        values = {
            "status": result.status,
            "steps": result.steps,
            "loss": last,
            "best_step": result.best_step,
            "best_loss": result.best_loss,
            "reason": result.reason,
        }
        found[result.name] = {name: value for name, value in values.items() if value is not None}
    with atomic_write(directory / RESULTS) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def write_many_config(
    directory: Path, model: Model, jobs: Sequence[Job], options: ManyOptions, about: Mapping[str, Any]
) -> None:
    """config.yaml: all jobs with all their options, as `jora train-many` reads them."""
    values = {
        **model_values(model),
        "out": os.fspath(directory),
        **_plain(dataclasses.asdict(options), leave=("resume",)),
        "jobs": [_job_values(job) for job in jobs],
    }
    write_values(directory / CONFIG, values, about)


def _job_values(job: Job) -> dict[str, Any]:
    data = {"data": job.data, "eval_data": job.eval_data}
    return {
        "name": job.name,
        **{name: os.fspath(value) for name, value in data.items() if isinstance(value, str | os.PathLike)},
        "method": job.method.name,
        **_plain(method_options(job.method)),
        **_plain(dataclasses.asdict(job.options), leave=SHARED),
    }


def _plain(values: Mapping[str, Any], leave: Sequence[str] = ()) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and name not in leave}
