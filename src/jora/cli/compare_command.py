"""`jora compare`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from jora.cli.options import CommandOptions
from jora.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class Options(CommandOptions):
    """Compare methods on the same data, budget and seeds: OUT gets a table, plots and a run directory for each."""

    plan: tyro.conf.Positional[str]
    """YAML: model, data, eval_data, seeds, training options for all, and `methods` with their own."""
    out: str
    """Directory for results and runs; the same command goes on with what is not finished in it."""


def run(options: Options, reporter: Reporter) -> None:
    """Run what is left, print the table; exit code 1 where a run failed, which the table then says."""
    from jora.compare.plan import read_plan
    from jora.compare.run import compare

    results = compare(read_plan(options.plan), options.out, reporter)
    print((Path(options.out).expanduser() / "results.md").read_text(encoding="utf-8"), end="")
    reporter.note(f"tables and plots: {Path(options.out) / 'index.html'}")
    if any(result.error for result in results):
        sys.exit(1)
