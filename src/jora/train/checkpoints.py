"""Checkpoints: arrays through orbax, everything else as JSON; complete or absent, never half.

checkpoints/step-00000200/state/     trained arrays, optimiser state, step (orbax)
checkpoints/step-00000200/run.json   identity of the run, best evaluation so far

The data position is the step: the plan of batches is a function of data, options and seed. Dropout is
keyed by seed, step and row. So nothing else is needed to go on bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jora.errors import InputError
from jora.models.decoder import Remat
from jora.models.source import read_json
from jora.reporting import Reporter
from jora.sharding import hosts

_NAME = re.compile(r"step-(\d{8})")


@dataclass
class Progress:
    """What a run knows beside its arrays. `best_loss` and `best_step` are None before an evaluation."""

    identity: dict[str, Any]
    remat: Remat
    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


class Checkpoints:
    """The checkpoints of one run directory: the latest `keep`, and the best."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` finished steps lies."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self, identity: dict[str, Any], reporter: Reporter) -> Any:
        """What `read_progress` gives of the last checkpoint; None where there is none yet, to start at step 0.

        Raises InputError where it is that of a run with another `identity`.
        """
        run, steps = self.directory.parent, self.steps()
        if not steps:
            reporter.note(f"{run}: no checkpoint yet, starting at step 0")
            return None
        progress = self.read_progress(steps[-1])
        check_same_run(progress.identity, identity, run)
        reporter.note(f"resuming after step {progress.step}")
        return progress

    def save(self, state: Any, progress: Progress) -> Path:
        """Write a checkpoint of a tree of arrays, then remove those that are no longer kept."""
        path = self.path(progress.step)
        with hosts.atomic_directory_of_all(path) as temporary, _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary.absolute() / "state", state)
            checkpointer.wait_until_finished()
            if hosts.first():
                (temporary / "run.json").write_text(json.dumps(asdict(progress), indent=2) + "\n", encoding="utf-8")
        for step in self.steps()[: -self.keep]:
            if step != progress.best_step and hosts.first():
                shutil.rmtree(self.path(step))
        return path

    def read_progress(self, step: int) -> Progress:
        """The JSON part of a checkpoint. Raises InputError where it is not one of this version's."""
        path = self.path(step) / "run.json"
        try:
            return Progress(**read_json(path))
        except InputError as error:
            raise InputError(f"{error}: delete {path.parent} to go on from the checkpoint before it") from error
        except TypeError:
            raise InputError(f"{path}: written by another version of jora: start anew in another directory") from None

    def restore(self, step: int, like: Any) -> Any:
        """The arrays of a checkpoint, laid out as the abstract tree `like`. Raises InputError where it is damaged."""
        path = self.path(step)
        with _orbax().StandardCheckpointer() as checkpointer:
            try:
                return checkpointer.restore(path.absolute() / "state", like)
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).strip().splitlines()[0][:200]
                raise InputError(
                    f"{path}: a damaged checkpoint ({reason}): delete it to go on from the one before it"
                ) from error


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise InputError(f"checkpoints need orbax ({error}): pip install orbax-checkpoint") from error
    return orbax.checkpoint


def check_same_run(then: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Raise InputError, naming the first difference, where a run would go on as another."""
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise InputError(
                f"{directory}: cannot resume, {name} differs: it was {_short(then.get(name))} and is now "
                f"{_short(now.get(name))}: use the same, or another output directory"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
