"""What one run of a comparison gave, as it lies in its directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jora.files import atomic_write

JOB, RESULT, TRAINING = "job.json", "result.json", "training.json"


@dataclass(frozen=True)
class Training:
    """What training one adapter took.

    Attributes:
        parameters: numbers that the optimiser moved.
        adapter_bytes: of the tensor files that training wrote, a whole model's where all of it was trained.
        steps, seconds: optimiser steps and their time in all, compilation left out.
        seconds_a_step: the median.
        peak_bytes: most memory of the fullest device; on a CPU most memory of the process, compilation
            and loading included.
        curve: (seconds, loss) after each step; nats per answer token.
    """

    parameters: int
    adapter_bytes: int
    steps: int
    seconds: float
    seconds_a_step: float
    peak_bytes: int
    curve: tuple[tuple[float, float], ...] = field(repr=False)


@dataclass(frozen=True)
class Result:
    """One run: `label` and `seed` name it; the base model alone has seed None and no training.

    Attributes:
        scores: `EvalResult.metrics()`; empty where the run failed.
        machine: where it ran.
        error: why there are no scores.
    """

    label: str
    seed: int | None
    scores: Mapping[str, float | int | None] = field(default_factory=dict)
    training: Training | None = None
    machine: str = ""
    error: str | None = None


def write_json(path: Path, value: Any) -> None:
    """Plain data as JSON; the file appears when it is whole."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_result(path: Path, result: Result) -> None:
    """`result.json`."""
    write_json(path, dataclasses.asdict(result))


def read_result(path: Path) -> Result:
    """What `write_result` wrote."""
    values = read_json(path)
    training = values.pop("training")
    return Result(**values, training=None if training is None else read_training(training))


def read_training(values: Mapping[str, Any]) -> Training:
    """From JSON."""
    return Training(**{**values, "curve": tuple((seconds, loss) for seconds, loss in values["curve"])})
