"""The reports of `benchmarks/serve.py` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

ALLOWED = 0.05  # points of the base's step above the floor
SATURATED = 1.25  # a run that takes less than this times the arrivals' span was held back by them, not by the engine


def settings(asked: Mapping[str, Any]) -> str:
    """What was asked for, in one line."""
    parts = [f"{name.replace('_', '-')} {_plain(value)}" for name, value in asked.items() if value is not None]
    return "Settings: " + ", ".join(parts) + "."


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def floor(report: Mapping[str, Any]) -> str:
    """Decode steps beside their floor."""
    head = (
        "distinct adapters",
        "ms a step (range)",
        "x base (range)",
        "floor x base",
        "bytes",
        "FLOPs",
        "above floor",
        "eta",
    )
    rows = []
    for step in report["steps"]:
        ratio, floor = median(step["ratios"]), step["floor_ratio"]
        verdict = "met" if ratio - floor <= ALLOWED else "missed"
        eta = step["floor_seconds"] / median(step["seconds"])
        ms = [1e3 * s for s in step["seconds"]]
        apart = f"{ratio:.3f} ({min(step['ratios']):.3f} - {max(step['ratios']):.3f})"
        cells = [str(step["distinct"]), f"{median(ms):.2f} ({min(ms):.2f} - {max(ms):.2f})", apart]
        cells += [f"{step[name]:.3f}" for name in ("floor_ratio", "bytes_ratio", "flops_ratio")]
        rows.append([*cells, f"{100 * (ratio - floor):+.1f} points ({verdict})", f"{eta:.2f}"])
    speed = report["speed"]
    text = (
        f"Floor ratio: {report['formula']}; {report['context']} tokens of context (the mean), memory reads at "
        f"{speed['bandwidth'] / 1e9:.1f} GB/s and products at {speed['rate'] / 1e9:.0f} GFLOP/s, both measured here. "
        f"Aim: at most {100 * ALLOWED:.0f} points above the floor. eta = floor / measured."
    )
    return f"{_table(head, rows)}\n\n{text}"


def trace(report: Mapping[str, Any]) -> str:
    """Throughput and latencies, medians over the rounds; ratios are medians of each round's."""
    rounds: Mapping[str, list[dict[str, Any]]] = report["rounds"]
    head = ("", "requests", "requests/s (range)", "output tokens/s", "goodput", "TTFT s", "TPOT ms", "ITL ms", "e2e s")
    rows = []
    for name, runs in rounds.items():
        done = [run for run in runs if run["requests"]]
        if not done:
            rows.append([name, "0"] + ["-"] * (len(head) - 2))
            continue
        rate = [run["requests_per_s"] for run in done]
        cells = [name, f"{sum(run['requests'] for run in done)}"]
        cells += [f"{median(rate):.2f} ({min(rate):.2f} - {max(rate):.2f})"]
        cells += [f"{median(run['output_tokens_per_s'] for run in done):.0f}"]
        cells += [f"{median(run['goodput'] for run in done):.2f}"]
        for figure, scale in (("ttft", 1.0), ("tpot", 1e3), ("itl", 1e3), ("e2e", 1.0)):
            cells.append(" / ".join(_of(done, figure, p, scale) for p in ("p50", "p90", "p99")))
        rows.append(cells)
    agreed = "; ".join(f"{pair.replace(' ', ' and ')} {median(v):.2f}" for pair, v in report["agreement"].items())
    text = f"Latencies are p50 / p90 / p99. Share of requests with the same first greedy tokens: {agreed or '-'}."
    return "\n\n".join([_table(head, rows), _ratios(rounds), text, *_idle(rounds)])


def _idle(rounds: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """A warning where throughputs do not say what a contestant can do."""
    waited = [
        name
        for name, runs in rounds.items()
        if any(run["requests"] and run["seconds"] < SATURATED * run["last_arrival"] for run in runs)
    ]
    if not waited:
        return []
    text = "were not saturated: they waited for requests, so their throughput is the trace's and no ratio counts"
    return [f"**{', '.join(waited)} {text}. Raise --rate.**"]


def _of(runs: Sequence[Mapping[str, Any]], figure: str, percentile: str, scale: float) -> str:
    values = [run[figure][percentile] for run in runs if run[figure]]
    return f"{scale * median(values):.3g}" if values else "-"


def _ratios(rounds: Mapping[str, list[dict[str, Any]]]) -> str:
    """Output tokens a second of each contestant (row) over each other's (column)."""
    names = [name for name, runs in rounds.items() if all(run["requests"] for run in runs)]
    rows = []
    for name in names:
        cells = [name]
        for other in names:
            pairs = zip(rounds[name], rounds[other], strict=True)
            cells.append(f"{median(a['output_tokens_per_s'] / b['output_tokens_per_s'] for a, b in pairs):.2f}")
        rows.append(cells)
    return "Output tokens/s, row over column:\n\n" + _table(["", *names], rows)


def fairness(report: Mapping[str, Any]) -> str:
    """Service between clients under each scheduler."""
    head = ("", "output tokens/s", "x FCFS", "largest gap", "gap at the end", "difference max / mean, service/s")
    rows = []
    rounds = report["rounds"]
    for name, runs in rounds.items():
        rate = median(run["output_tokens_per_s"] for run in runs)
        pairs = zip(runs, rounds["fcfs"], strict=True)
        ratio = median(a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in pairs)
        gaps = [f"{median(run[key] for run in runs):.0f}" for key in ("gap_max", "gap_end")]
        apart = " / ".join(f"{median(run[f'difference_{k}'] for run in runs):.1f}" for k in ("max", "mean"))
        rows.append([name, f"{rate:.0f}", f"{ratio:.3f}", *gaps, apart])
    sent = ", ".join(f"{60 * rate:.0f}" for rate in report["rates"])
    text = (
        f"Clients send {sent} requests a minute; the machine serves {60 * report['capacity']:.0f}. Service is 1 an "
        f"input token and 2 an output token; gap: accumulated service, most less least; difference: in windows of "
        f"{report['window']:.3g} s."
    )
    return f"{_table(head, rows)}\n\n{text}"
