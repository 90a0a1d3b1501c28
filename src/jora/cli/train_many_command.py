"""`jora train-many`: the jobs of a YAML file, trained in one batch.

model: org/model              # also --model; out, mesh, dtype and quant likewise
out: runs/customers
at_once: 16                   # what all jobs share (see `ManyOptions`)
epochs: 2                     # any option of a job: the default of those that do not set it
jobs:
  - {name: acme, data: acme.jsonl, rank: 8}
  - {name: umbrella, data: umbrella.jsonl, rank: 64, learning_rate: 1e-4, eval_data: held-out.jsonl}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from jora.cli.checks import check_file, check_names, check_parent
from jora.cli.common import ModelOptions, open_model
from jora.cli.method_choice import DEFAULT, MethodChoice
from jora.cli.options import CommandOptions, nearest, option_names, read_values, read_yaml
from jora.errors import InputError
from jora.reporting import Reporter
from jora.train.many.jobs import SHARED, Job, ManyOptions
from jora.train.options import TrainOptions

if TYPE_CHECKING:
    from jora.train.many.record import JobResult


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Train many adapters of one base in one batch: OUT gets a directory for each job, as `jora train` writes it."""

    jobs: tyro.conf.Positional[str]
    """YAML: `jobs`, each with name, data and options of its own; beside them what all share, and defaults."""
    model: str | None = None
    """A Hugging Face model directory, a hub id, or a .gguf file; by default what the file says."""
    out: str | None = None
    """The run directory; by default what the file says."""
    mesh: str | None = None
    """Devices to share the work, like fsdp=2,tensor=4; a CPU simulates them."""
    resume: bool = False
    """Continue the run in the output directory from its latest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class _Whole(ModelOptions):
    """What stands beside the jobs."""

    out: str
    many: tyro.conf.OmitArgPrefixes[ManyOptions] = field(default_factory=ManyOptions)


@dataclass(frozen=True, kw_only=True)
class _JobOptions(MethodChoice):
    """What stands in a job."""

    name: str
    data: str
    eval_data: str | None = None
    training: tyro.conf.OmitArgPrefixes[TrainOptions] = field(default_factory=TrainOptions)


def run(options: Options, reporter: Reporter) -> None:
    """Read the jobs, load the model, train, say what became of each."""
    given = {"model": options.model, "out": options.out, "mesh": options.mesh, "resume": options.resume or None}
    whole, jobs = read_jobs(Path(options.jobs).expanduser(), {k: v for k, v in given.items() if v is not None})
    _check(whole, jobs)
    model = open_model(whole, reporter)
    from jora.train.many.api import train_many

    results = train_many(model, jobs, out=whole.out, options=whole.many, reporter=reporter)
    print(_table(results))


def _check(whole: _Whole, jobs: list[Job]) -> None:
    from jora.train.record import open_directory

    for job in jobs:
        for option, path in (("data", job.data), ("eval_data", job.eval_data)):
            if isinstance(path, str):
                check_file(f"job {job.name}: {option}", path)
    check_parent(whole.out)
    open_directory(whole.out, whole.many.resume)  # makes nothing yet
    check_names(whole.model, None)


def read_jobs(path: Path, given: Mapping[str, Any]) -> tuple[_Whole, list[Job]]:
    """What all jobs share (`given` by name wins over the file), and the jobs.

    Raises:
        InputError: the file holds no jobs; an unknown key, with the nearest; a value that an option refuses.
    """
    where = str(path)
    values = read_yaml(path, where)
    listed = values.pop("jobs", None)
    if not isinstance(listed, list) or not listed or not all(isinstance(job, dict) for job in listed):
        raise InputError(f"{where}: jobs is a list of `{{name: ..., data: ..., options}}`; give at least one")
    shared = {*option_names(_Whole)} - {"config"}
    defaults = {name: value for name, value in values.items() if name not in shared}
    _check_defaults(defaults, shared, where)
    whole = read_values(_Whole, {n: v for n, v in values.items() if n in shared} | dict(given), where)
    return whole, [_job(job, defaults, f"{where}, job {job.get('name', number)}") for number, job in enumerate(listed)]


def _check_defaults(defaults: Mapping[str, Any], shared: set[str], where: str) -> None:
    from jora.methods import registry

    own = {*option_names(_JobOptions)} - {"config", "name", "method_options", *SHARED}
    of_methods = {option for name in registry.names() for option in option_names(registry.method_class(name))}
    for name in defaults:
        if name not in own | of_methods:
            raise InputError(
                f"{where}: unknown key {name!r}; the nearest is {nearest(name, own | of_methods | shared)!r}"
            )


def _job(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> Job:
    from jora.methods import registry

    # A default that is an option of another method says nothing about this job.
    method = str(values.get("method", defaults.get("method", DEFAULT)))
    fits = {*option_names(_JobOptions), *option_names(registry.method_class(method))}
    merged = {name: value for name, value in defaults.items() if name in fits} | dict(values)
    read = read_values(_JobOptions, merged, where)
    return Job(
        name=read.name,
        data=read.data,
        eval_data=read.eval_data,
        method=read.build_method(),
        options=read.training,
    )


def _table(results: list[JobResult]) -> str:
    width = max(len(result.name) for result in results)
    lines = []
    for result in results:
        losses = [line["loss"] for line in result.history if "loss" in line]
        end = f"loss {losses[-1]:.4f}" if losses else ""
        best = "" if result.best_loss is None else f", best evaluation {result.best_loss:.4f} at {result.best_step}"
        why = f" ({result.reason})" if result.reason else ""
        lines.append(f"{result.name:<{width}}  {result.status} after {result.steps} steps  {end}{best}{why}")
    return "\n".join(lines)
