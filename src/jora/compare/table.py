"""What came out, as numbers: a mean and a spread for each method, as Markdown and for the page; every run as CSV."""

from __future__ import annotations

import csv as csv_files
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jora.compare.results import Result


class Unit(NamedTuple):
    """How numbers of some size are written."""

    divisor: float
    decimals: int
    suffix: str = ""

    def text(self, number: float) -> str:
        """Without the suffix."""
        return f"{number / self.divisor:.{self.decimals}f}"


class Measure(NamedTuple):
    """A column: what it is called, the unit for a number of it, and which end is better."""

    heading: str
    unit: Callable[[float], Unit]
    better: Literal["less", "more"]


def _fitting(*units: Unit) -> Callable[[float], Unit]:
    """The last of some units, from small to large, that a number reaches."""
    return lambda number: [units[0], *(unit for unit in units[1:] if number >= unit.divisor)][-1]


_PERCENT = _fitting(Unit(0.01, 1, " %"))
_COUNT = _fitting(Unit(1, 0), Unit(1e3, 1, " k"), Unit(1e6, 2, " M"), Unit(1e9, 2, " G"))
_BYTES = _fitting(Unit(1, 0, " B"), Unit(2**10, 1, " KiB"), Unit(2**20, 1, " MiB"), Unit(2**30, 2, " GiB"))

# Name in `values` -> column.
MEASURES: dict[str, Measure] = {
    "loss": Measure("loss, nats per answer token", _fitting(Unit(1, 3)), "less"),
    "f1": Measure("answer F1", _PERCENT, "more"),
    "exact_match": Measure("exact match", _PERCENT, "more"),
    "quote_share": Measure("quotes that stand in the context", _PERCENT, "more"),
    "parameters": Measure("trained parameters", _COUNT, "less"),
    "adapter_bytes": Measure("adapter file", _BYTES, "less"),
    "seconds_a_step": Measure("time a step", _fitting(Unit(1, 3, " s"), Unit(1, 2, " s")), "less"),
    "seconds": Measure("training", _fitting(Unit(1, 1, " s"), Unit(60, 1, " min"), Unit(3600, 2, " h")), "less"),
    "peak_bytes": Measure("peak memory", _BYTES, "less"),
}
SCORES = ("loss", "f1", "exact_match", "quote_share", "answered")
TRAINING = ("parameters", "adapter_bytes", "steps", "seconds", "seconds_a_step", "peak_bytes")


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; one seed has no deviation."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Row:
    """A method over its seeds.

    Attributes:
        spreads: of every measure that all its finished runs have.
        results: the finished runs.
        failures: "seed 1: why" of the others.
    """

    label: str
    spreads: Mapping[str, Spread]
    results: tuple[Result, ...]
    failures: tuple[str, ...]


def values(result: Result) -> dict[str, float | int | None]:
    """All numbers of a run by name."""
    found = {name: result.scores.get(name) for name in SCORES}
    return found | {name: getattr(result.training, name, None) for name in TRAINING}


def summarise(labels: Sequence[str], results: Sequence[Result]) -> list[Row]:
    """A row a method, in the plan's order; those without any run yet are left out."""
    rows = []
    for label in labels:
        own = [result for result in results if result.label == label and result.seed is not None]
        if not own:
            continue
        done = tuple(result for result in own if result.error is None)
        failures = tuple(f"seed {result.seed}: {result.error}" for result in own if result.error is not None)
        rows.append(Row(label, {name: s for name in MEASURES if (s := _spread(done, name))}, done, failures))
    return rows


def _spread(results: Sequence[Result], name: str) -> Spread | None:
    numbers = [number for result in results if (number := values(result)[name]) is not None]
    if not numbers or len(numbers) < len(results):
        return None
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def cell(row: Row, name: str) -> str:
    """Mean ± deviation in the mean's unit; a deviation that would read as zero is left out."""
    spread = row.spreads.get(name)
    if spread is None:
        return "failed" if not row.results else "none quoted" if name == "quote_share" else "-"
    unit = MEASURES[name].unit(spread.mean)
    deviation = unit.text(spread.deviation or 0)
    plus_minus = f" ± {deviation}" if deviation != unit.text(0) else ""
    return f"{unit.text(spread.mean)}{plus_minus}{unit.suffix}"


def base_cell(base: Result | None, name: str) -> str:
    """The same for the base model."""
    number = values(base)[name] if base else None
    if number is None:
        return "-"
    unit = MEASURES[name].unit(number)
    return unit.text(number) + unit.suffix


def best(rows: Sequence[Row], name: str) -> Row | None:
    """The method with the best mean."""
    sign = 1 if MEASURES[name].better == "less" else -1
    own = [row for row in rows if name in row.spreads]
    return min(own, key=lambda row: sign * row.spreads[name].mean, default=None)


def markdown(rows: Sequence[Row], base: Result | None) -> str:
    """A table with a line a method, and under it what failed."""
    seeds = max((len(row.results) + len(row.failures) for row in rows), default=0)
    examples = base.scores.get("examples") if base else None
    lines = [
        f"{examples} examples; mean ± standard deviation over {seeds} seeds" if seeds > 1 else f"{examples} examples"
    ]
    headings = ["", *(measure.heading for measure in MEASURES.values())]
    lines += ["", _line(headings), _line(["---", *["---:"] * len(MEASURES)])]
    lines.append(_line(["base", *(base_cell(base, name) for name in MEASURES)]))
    lines += [_line([_escaped(row.label), *(cell(row, name) for name in MEASURES)]) for row in rows]
    failures = [f"- {row.label}, {failure}" for row in rows for failure in row.failures]
    if failures:
        lines += ["", "Failed:", "", *failures]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def csv(results: Sequence[Result]) -> str:
    """A line a run: every number as it was measured."""
    file = io.StringIO()
    names = [*SCORES, *TRAINING]
    writer = csv_files.writer(file, lineterminator="\n")
    writer.writerow(["label", "seed", *names, "machine", "error"])
    for result in results:
        numbers = values(result)
        seed = "" if result.seed is None else result.seed
        cells = ["" if numbers[name] is None else numbers[name] for name in names]
        writer.writerow([result.label, seed, *cells, result.machine, result.error or ""])
    return file.getvalue()
