"""Every method with every seed, one process after the other, and the results written after each.

OUT/results.json, results.csv, results.md, index.html and the plots; OUT/base/ and OUT/runs/LABEL/seed-N/ hold one run
each. A run that has a result is not repeated: the same call goes on where the last one was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jora.cli.common import ModelOptions
from jora.cli.options import option_names
from jora.compare import page, plots, table
from jora.compare.plan import Entry, Plan
from jora.compare.results import JOB, RESULT, Result, read_json, read_result, write_json
from jora.errors import InputError
from jora.files import atomic_write
from jora.reporting import SILENT, Reporter
from jora.ui.facts import duration


class _Run(NamedTuple):
    directory: Path
    job: dict[str, Any]


def compare(plan: Plan, out: str | os.PathLike[str], reporter: Reporter = SILENT) -> list[Result]:
    """Run what is not finished yet, write tables and plots; the results in the order of the runs.

    A method that fails (its loss diverges, its options do not fit the model, its process dies) is a result that
    says so. Failures by a user's mistake are final until the plan's options change; others are tried again.

    Raises:
        InputError: data that is not there, no matplotlib, or `out` holds another comparison.
        KeyboardInterrupt: after the run under way has written a checkpoint.
    """
    plots.require_matplotlib()
    out = Path(out).expanduser()
    runs = _runs(plan, out)
    open_runs = [run for run in runs if not _is_finished(run)]
    reporter.note(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them finished: {out}")
    crashed: dict[Path, Result] = {}
    started = time.monotonic()
    for number, run in enumerate(open_runs):
        reporter.note(f"run {number + 1} of {len(open_runs)}: {_name(run)}{_left(number, len(open_runs), started)}")
        if error := _execute(run):
            crashed[run.directory] = Result(run.job["label"], run.job["seed"], error=error)
        result = _result(run, crashed)
        if result is not None and result.error:
            reporter.note(f"{_name(run)} failed: {result.error}")
        _write(plan, out, runs, crashed)
    return _write(plan, out, runs, crashed) if not open_runs else _results(runs, crashed)


def _runs(plan: Plan, out: Path) -> list[_Run]:
    """The base first, then seed by seed, so that a comparison that was stopped has all methods at some seeds."""
    digests = {name: _digest(name) for name in (str(plan.common["data"]), plan.eval_data)}

    def job(label: str, seed: int | None, options: dict[str, Any], train: bool) -> dict[str, Any]:
        values = {
            "label": label,
            "seed": seed,
            "train": train,
            "options": options,
            "eval_data": plan.eval_data,
            "evaluation": dataclasses.asdict(plan.evaluation),
            "digests": digests if train else {plan.eval_data: digests[plan.eval_data]},
        }
        return json.loads(json.dumps(values))  # as it will be read again, to be compared

    base = {name: value for name, value in plan.common.items() if name in ("data", *option_names(ModelOptions))}
    runs = [_Run(out / "base", job("base", None, {**base, "out": "unused"}, train=False))]
    for seed in plan.seeds:
        for entry in plan.entries:
            directory = _directory(out, entry, seed)
            runs.append(_Run(directory, job(entry.label, seed, plan.options(entry, seed, directory / "train"), True)))
    return runs


def _directory(out: Path, entry: Entry, seed: int) -> Path:
    return out / "runs" / entry.slug / f"seed-{seed}"


def _digest(path: str) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: it is the plan's data or eval_data") from error


def _is_finished(run: _Run) -> bool:
    """Whether there is a result of these very settings; a failure of others is cleared away.

    Raises:
        InputError: something else was run in this directory.
    """
    path = run.directory / JOB
    if not path.exists():
        return False
    before = read_json(path)
    done = (run.directory / RESULT).exists()
    if before == run.job:
        return done
    if done and read_result(run.directory / RESULT).error:
        shutil.rmtree(run.directory)
        return False
    differing = _differing(before, run.job)
    raise InputError(
        f"{run.directory} was run with other settings ({differing} differs): remove it, give the method another "
        "label, or give another --out"
    )


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The name of the first setting that two jobs do not share."""
    flat = [{**job, **job["options"], **job["evaluation"], "options": 0, "evaluation": 0} for job in (before, now)]
    names = [name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)]
    return names[0]


def _execute(run: _Run) -> str | None:
    """Run it to its end; why its process failed, if it did without a result."""
    write_json(run.directory / JOB, run.job)
    process = subprocess.Popen([sys.executable, "-m", "jora.compare.worker", str(run.directory)])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C reached it too: it writes a checkpoint
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code < 0:
        return f"its process was ended by signal {-code}{' (out of memory?)' if code == -9 else ''}"
    return f"its process ended with code {code}: see its messages" if code else None


def _name(run: _Run) -> str:
    label, seed = run.job["label"], run.job["seed"]
    return "the base model, not trained" if seed is None else f"{label}, seed {seed}"


def _left(done: int, total: int, started: float) -> str:
    if not done:
        return ""
    return f" (about {duration((total - done) * (time.monotonic() - started) / done)} left)"


def _result(run: _Run, crashed: dict[Path, Result]) -> Result | None:
    if run.directory in crashed:
        return crashed[run.directory]
    path = run.directory / RESULT
    return read_result(path) if path.exists() else None


def _results(runs: list[_Run], crashed: dict[Path, Result]) -> list[Result]:
    found = (_result(run, crashed) for run in runs)
    return [result for result in found if result is not None]


def _write(plan: Plan, out: Path, runs: list[_Run], crashed: dict[Path, Result]) -> list[Result]:
    """Every file of results, from what there is so far."""
    results = _results(runs, crashed)
    rows = table.summarise([entry.label for entry in plan.entries], results)
    base = next((result for result in results if result.seed is None), None)
    missing = len(runs) - len(results)
    write_json(
        out / "results.json",
        {"plan": dataclasses.asdict(plan), "results": [dataclasses.asdict(result) for result in results]},
    )
    texts = {
        "results.csv": table.csv(results),
        "results.md": table.markdown(rows, base),
        "index.html": page.html(plan, rows, base, plots.draw(rows, base, out), missing),
    }
    for name, text in texts.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return results
