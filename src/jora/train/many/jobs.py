"""What a user gives: jobs, and the options that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jora.errors import InputError
from jora.methods.lora import LoRA
from jora.methods.method import Method
from jora.models.decoder import Remat
from jora.train.examples import Data
from jora.train.options import TrainOptions

# These are one for all jobs: they are set beside the jobs, not in them.
SHARED = ("remat", "save_every", "keep_checkpoints", "resume", "deterministic")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TAKEN = ("checkpoints", "config.yaml", "results.json")  # names in the directory of the whole


@dataclass(frozen=True, kw_only=True)
class Job:
    """One adapter to train: what `jora.train` would be given.

    Attributes:
        name: of its directory; letters, digits, ".", "_" and "-".
        data, eval_data: as for `jora.train`.
        method: with its options.
        options: all but `SHARED`, which must have their defaults here.
    """

    name: str
    data: Data
    eval_data: Data | None = None
    method: Method = field(default_factory=LoRA)
    options: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise InputError(f"job name {self.name!r}: use letters, digits, '.', '_' and '-', and none of {_TAKEN}")
        defaults = TrainOptions()
        for name in SHARED:
            if getattr(self.options, name) != getattr(defaults, name):
                raise InputError(f"job {self.name}: {name} is one for all jobs: set it beside them, not in one")
        if self.options.optimizer != "adamw" or self.options.layerwise:
            raise InputError(f"job {self.name}: jobs in one batch are trained by optimizer adamw alone")


@dataclass(frozen=True, kw_only=True)
class ManyOptions:
    """What all jobs share."""

    at_once: int | None = None
    """Most jobs of equal shapes that train at a time; others wait for one to end. By default all train at once."""
    remat: Literal["auto"] | Remat = "auto"
    """What is computed again in the backward pass to save memory; auto takes the least that fits."""
    save_every: int = 200
    """Steps between checkpoints; there is one at the end and on Ctrl-C in any case."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept."""
    resume: bool = False
    """Continue the run in the output directory from its latest checkpoint."""
    deterministic: bool = False
    """On a GPU: only operations that give the same bits every time (slower). A CPU always does."""

    def __post_init__(self) -> None:
        if self.at_once is not None and self.at_once < 1:
            raise InputError(f"at_once is {self.at_once}: it must be at least 1")
        self.single()

    def single(self) -> TrainOptions:
        """The shared options under `TrainOptions`' names, checked by its rules."""
        return TrainOptions(**{name: getattr(self, name) for name in SHARED})


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise InputError for no job at all, or two of one name."""
    if not jobs:
        raise InputError("there is no job to train: give at least one")
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two jobs are called {twice[0]!r}: names are directories and must differ")
