"""The drawings of a comparison: loss against time, score against trained parameters, memory and time as bars.

Each is written as PNG; the page has the same as SVG. A method keeps its colour, mark and line in all of them:
colours by Okabe and Ito and by Tol, told apart by all common kinds of colour vision.
"""

from __future__ import annotations

import importlib.util
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jora.compare.results import Result
from jora.compare.table import Row
from jora.errors import InputError
from jora.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#555555")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.4)))
INK, GRID = "#222222", "#DDDDDD"
SMOOTH = 12  # the curve is a trailing mean over one twelfth of the steps: batches differ in how hard they are
GIB = 2**30
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "jora",
}


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed: better now than after hours of training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("jora compare draws with matplotlib, which is not installed: pip install 'jora[compare]'")


def draw(rows: Sequence[Row], base: Result | None, out: Path) -> dict[str, bytes]:
    """Write `loss-time.png`, `score-parameters.png` and `memory.png` into `out`; {title: SVG} for the page."""
    import matplotlib

    drawings: dict[str, tuple[str, Callable[[], Figure]]] = {
        "loss-time": ("Loss against time", lambda: _loss_against_time(rows)),
        "score-parameters": ("Score against trained parameters", lambda: _score_against_parameters(rows, base)),
        "memory": ("Memory and time", lambda: _memory_bars(rows)),
    }
    found = {}
    with matplotlib.rc_context(_STYLE):
        for name, (title, make) in drawings.items():
            figure = make()
            with atomic_write(out / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=160, bbox_inches="tight", pad_inches=0.15)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.15, metadata={"Date": None})
            found[title] = buffer.getvalue()
    return found


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would choose a window system and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    return figure, list(axes)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _mark(index: int) -> str:
    return MARKS[index % len(MARKS)]


def _line(index: int) -> Any:
    return LINES[index // len(COLOURS) % len(LINES)]


def _smoothed(losses: Sequence[float]) -> list[float]:
    window = max(1, round(len(losses) / SMOOTH))
    return [statistics.fmean(losses[max(0, at + 1 - window) : at + 1]) for at in range(len(losses))]


def _loss_against_time(rows: Sequence[Row]) -> Figure:
    """A line a method through the means over its seeds at each step, with a band of one standard deviation."""
    figure, (axes,) = _figure(1, 5.0)
    ends = []
    for index, row in enumerate(rows):
        curves = [result.training.curve for result in row.results if result.training]
        if not curves:
            continue
        steps = min(map(len, curves))
        times = [statistics.fmean(curve[at][0] for curve in curves) for at in range(steps)]
        smooth = [_smoothed([loss for _, loss in curve[:steps]]) for curve in curves]
        means = [statistics.fmean(at) for at in zip(*smooth, strict=True)]
        axes.plot(times, means, color=_colour(index), linestyle=_line(index), linewidth=2)
        ends.append((means[-1], index, row.label))
        axes.plot(times[-1:], means[-1:], color=_colour(index), marker=_mark(index), markersize=7)
        if len(curves) > 1:
            spread = [statistics.stdev(at) for at in zip(*smooth, strict=True)]
            low = [mean - s for mean, s in zip(means, spread, strict=True)]
            high = [mean + s for mean, s in zip(means, spread, strict=True)]
            axes.fill_between(times, low, high, color=_colour(index), alpha=0.1, linewidth=0)
    axes.set_title("Training loss against time")
    axes.set_xlabel("seconds of training, compilation left out")
    axes.set_ylabel("loss, nats per answer token")
    axes.grid(True)
    if ends:
        axes.set_xlim(left=0)
        _legend(figure, ends)
    return figure


def _legend(figure: Figure, ends: Sequence[tuple[float, int, str]]) -> None:
    """Beside the axes, from the line that ends highest to the lowest."""
    from matplotlib.lines import Line2D

    handles = []
    for _, index, label in sorted(ends, reverse=True):
        style: dict[str, Any] = {"color": _colour(index), "linestyle": _line(index), "marker": _mark(index)}
        handles.append(Line2D([], [], linewidth=2, markersize=6, label=label, **style))
    figure.legend(handles=handles, loc="outside right center", handlelength=3.6, labelspacing=0.7)


def _score_against_parameters(rows: Sequence[Row], base: Result | None) -> Figure:
    """Evaluation loss and F1 over the number of trained parameters (logarithmic), the base model as a line."""
    figure, panels = _figure(2, 5.0)
    titles = {"loss": "Loss on the evaluation data (less is better)", "f1": "Answer F1 (more is better)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        percent = 100.0 if name == "f1" else 1.0
        axes.set_xscale("log")
        axes.grid(True, which="major")
        points = []
        for index, row in enumerate(rows):
            if name not in row.spreads:
                continue
            x, (mean, deviation) = row.spreads["parameters"].mean, row.spreads[name]
            axes.errorbar(
                x,
                percent * mean,
                yerr=percent * deviation if deviation else None,
                color=_colour(index),
                marker=_mark(index),
                markersize=8,
                alpha=0.9,
                markeredgecolor="white",
                markeredgewidth=0.8,
                capsize=4,
                elinewidth=1.5,
            )
            points.append((x, percent * mean, row.label, _colour(index)))
        if base is not None and base.scores.get(name) is not None:
            level = percent * float(base.scores[name] or 0)
            axes.axhline(level, color="#777777", linestyle=(0, (4, 3)), linewidth=1.3)
            axes.annotate(
                "base",
                (1, level),
                (-3, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                color="#777777",
                fontsize=9,
            )
        axes.margins(x=0.16, y=0.12)
        axes.set_title(title)
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("nats per answer token" if name == "loss" else "percent")
        axes.xaxis.set_major_formatter(lambda value, _: _power(value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        _label_points(figure, axes, points)
    return figure


def _power(number: float) -> str:
    """A power of ten: `100`, `10 k`, `1 M`."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"


def _label_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names beside their points, each at the first place of a few where it covers no other name and no point."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.canvas.draw()  # the layout decides where a point stands
    at = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in at]
    frame = axes.get_window_extent()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for (x, y, label, colour), _ in sorted(zip(points, at, strict=True), key=lambda pair: -pair[0][1]):
        for dx, dy, ha in _PLACES:
            style: dict[str, Any] = {"ha": ha, "va": "center", "fontsize": 9, "color": colour, "annotation_clip": False}
            if abs(dy) > 14:
                style["arrowprops"] = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
            text = axes.annotate(label, (x, y), (dx, dy), textcoords="offset points", **style)
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without its leader
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if (inside and not any(box.overlaps(other) for other in taken)) or (dx, dy, ha) == _PLACES[-1]:
                taken.append(box)
                break
            text.remove()


# Offsets in points: beside, above, below, then farther and farther away.
_PLACES = [
    (dx, dy, ha)
    for dy in (0, 12, -12, 24, -24, 36, -36, 48, -48, 60, -60)
    for dx, ha in ((9, "left"), (-9, "right"), (0, "center"))
    if (dx, dy) != (0, 0)
]


def _memory_bars(rows: Sequence[Row]) -> Figure:
    """Peak memory and time a step, a bar a method, whiskers of one standard deviation."""
    figure, panels = _figure(2, 1.4 + 0.42 * max(len(rows), 3))
    columns = {
        "peak_bytes": ("Peak memory while training", "GiB", GIB, "{:.2f}"),
        "seconds_a_step": ("Time a step (median)", "seconds", 1, "{:.2f}"),
    }
    names = [row.label for row in rows]
    for axes, (name, (title, unit, scale, text)) in zip(panels, columns.items(), strict=True):
        longest = max((row.spreads[name].mean / scale for row in rows if name in row.spreads), default=1.0)
        for index, row in enumerate(rows):
            if name not in row.spreads:
                axes.text(0, index, " failed", va="center", color="#777777", fontsize=9)
                continue
            mean, deviation = row.spreads[name]
            error = deviation / scale if deviation else None
            style: dict[str, Any] = {
                "color": _colour(index),
                "height": 0.62,
                "ecolor": INK,
                "capsize": 3,
                "error_kw": {"elinewidth": 1.1},
            }
            axes.barh(index, mean / scale, xerr=error, **style)
            end = mean / scale + (error or 0) + 0.015 * longest
            axes.text(end, index, text.format(mean / scale), va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), names if axes is panels[0] else [""] * len(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.16 * longest)
        axes.tick_params(axis="y", length=0)
        axes.grid(True, axis="x")
        axes.set_title(title)
        axes.set_xlabel(unit)
    return figure
