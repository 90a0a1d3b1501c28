"""A comparison's plan: a YAML file like a `jora train` config, with `seeds`, `methods` and `evaluation`.

model: org/model
data: train.jsonl
eval_data: eval.jsonl         # what the results are measured on; not seen while training
seeds: [0, 1]
epochs: 1                     # any option of `jora train` that all methods share
evaluation: {max_new_tokens: 80}
methods:
  - {label: LoRA r16, method: lora, rank: 16, learning_rate: 5e-4}
  - {label: rsLoRA r16, method: lora, rank: 16, use_rslora: true}
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jora.cli.common import ModelOptions
from jora.cli.options import nearest, option_names, read_values, read_yaml
from jora.cli.train_command import Options
from jora.errors import InputError
from jora.train.options import TrainOptions

_OWN = ("data", "eval_data", "seeds", "methods", "evaluation")
# Decided by the comparison itself.
_DECIDED = frozenset({"config", "out", "seed", "resume", "eval_every", "patience"})
# What the methods are compared at, so the same for all.
BUDGET = frozenset({"epochs", "max_steps", "batch_size", "accumulation", "max_length", "too_long", "packing"})


@dataclass(frozen=True)
class Evaluation:
    """How the results are scored: options of `jora.evaluate`."""

    max_new_tokens: int = 128
    max_length: int | None = None
    limit: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Entry:
    """A method of the comparison; `options` are its own and its training's, as a `jora train` config holds them."""

    label: str
    options: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """The label as a directory's name."""
        return re.sub(r"[^a-z0-9.+]+", "-", self.label.lower()).strip("-.")


@dataclass(frozen=True)
class Plan:
    """What to compare; `common` are options of `jora train` that all methods share, model and data included."""

    path: str
    eval_data: str
    seeds: tuple[int, ...]
    evaluation: Evaluation
    common: Mapping[str, Any]
    entries: tuple[Entry, ...] = field(default=())

    def options(self, entry: Entry, seed: int, out: Path) -> dict[str, Any]:
        """The `jora train` config of one run."""
        return {**self.common, **entry.options, "seed": seed, "out": str(out)}


def read_plan(path: str | Path) -> Plan:
    """Read a plan and check all of it, every method's options included.

    Raises:
        InputError: the file is no plan; an unknown key (with the nearest); an option that all methods must
            share under a method; a value that an option refuses.
    """
    where = str(path)
    values = read_yaml(Path(path).expanduser(), where)
    common_names = {*option_names(ModelOptions), *option_names(TrainOptions)} - _DECIDED
    _refuse(values, _DECIDED, where, "is decided by the comparison: leave it out")
    _check_known(values, {*_OWN, *common_names}, where)
    for name in ("model", "data", "eval_data", "methods"):
        if values.get(name) is None:
            raise InputError(f"{where}: {name} is missing; add it")
    common = {name: value for name, value in values.items() if name in common_names or name == "data"}
    plan = Plan(
        path=where,
        eval_data=str(values["eval_data"]),
        seeds=_seeds(values.get("seeds", [0]), where),
        evaluation=_evaluation(values.get("evaluation") or {}, where),
        common=common,
    )
    plan = dataclasses.replace(plan, entries=_entries(values["methods"], where))
    for entry in plan.entries:
        at = f"{where}: method {entry.label!r}"
        _refuse(entry.options, BUDGET, at, "is the same for all methods: move it out of `methods`")
        _refuse(entry.options, {*_DECIDED, "model", "data", "eval_data", "adapter"}, at, "is no option of one method")
        _check_options(plan, entry, at)
    return plan


def _check_options(plan: Plan, entry: Entry, where: str) -> None:
    """Read them as a run will."""
    try:
        read_values(Options, plan.options(entry, plan.seeds[0], Path("out")), where).build_method()
    except InputError as error:
        text = str(error)  # a method's own check does not know where its options stand
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from error


def _refuse(values: Mapping[str, Any], refused: Iterable[str], where: str, reason: str) -> None:
    for name in values:
        if name in refused:
            raise InputError(f"{where}: {name} {reason}")


def _check_known(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for name in values:
        if name not in known:
            why = Options.explain(str(name)) and "an option of a method stands under `methods`"
            raise InputError(f"{where}: unknown key {name!r}; {why or f'the nearest is {nearest(str(name), known)!r}'}")


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = given if isinstance(given, list) else [given]
    if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"{where}: seeds are different whole numbers like [0, 1], not {given!r}")
    return tuple(seeds)


def _evaluation(given: Any, where: str) -> Evaluation:
    known = {f.name for f in dataclasses.fields(Evaluation)}
    if not isinstance(given, dict):
        raise InputError(f"{where}: evaluation holds options by name ({', '.join(sorted(known))}), not {given!r}")
    _check_known(given, known, f"{where}: evaluation")
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{where}: evaluation: {name} is a whole number from 1, not {value!r}")
    return Evaluation(**given)


def _entries(given: Any, where: str) -> tuple[Entry, ...]:
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: methods is a list of `{{label: ..., method: ..., options}}`")
    entries = []
    for number, item in enumerate(given, 1):
        if not isinstance(item, dict) or not item.get("method"):
            raise InputError(f"{where}: entry {number} of methods has no `method: NAME`")
        options = {str(name).replace("-", "_"): value for name, value in item.items() if name != "label"}
        entries.append(Entry(str(item.get("label", item["method"])), options))
    slugs: dict[str, str] = {}
    for entry in entries:
        if not entry.slug:
            raise InputError(f"{where}: the label {entry.label!r} has no letter or digit")
        if entry.slug in slugs:
            raise InputError(f"{where}: the labels {slugs[entry.slug]!r} and {entry.label!r} would share a directory")
        slugs[entry.slug] = entry.label
    return tuple(entries)
