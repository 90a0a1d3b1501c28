"""index.html: the table, the drawings and what was compared, in one file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jora.compare.plan import Plan
from jora.compare.results import Result
from jora.compare.table import MEASURES, Row, base_cell, best, cell

_STYLE = """
body { margin: 2.5rem auto; max-width: 76rem; padding: 0 1.5rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.about { color: #555; margin: 0 0 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; border-bottom: 2px solid #bbb; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.base td, td.none { color: #777; } td.best { font-weight: 700; }
table.options td { text-align: left; white-space: normal; }
img { width: 100%; height: auto; } code { font-size: .92em; }
"""


def html(plan: Plan, rows: Sequence[Row], base: Result | None, drawings: Mapping[str, bytes], missing: int) -> str:
    """The page; `drawings` are SVG by title, `missing` runs that have no result yet."""
    seeds = f"{len(plan.seeds)} seeds, mean ± standard deviation" if len(plan.seeds) > 1 else "one seed"
    examples = base.scores.get("examples") if base else None
    about = f"{len(plan.entries)} methods on {plan.common['model']}, {seeds}, {examples or '?'} evaluation examples."
    if missing:
        about += f" Not finished: {missing} runs have no result yet."
    parts = [
        f"<h1>Methods compared</h1>\n<p class='about'>{escape(about)}</p>",
        _table(rows, base),
        _failures(rows),
        *(_drawing(title, svg) for title, svg in drawings.items()),
        _options(plan),
        _machines(rows, base),
    ]
    body = "\n".join(filter(None, parts))
    return (
        "<!doctype html>\n<html lang='en'>\n<head><meta charset='utf-8'><title>Methods compared</title>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Row], base: Result | None) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ["", *(m.heading for m in MEASURES.values())])
    winners = {name: best(rows, name) for name in MEASURES}
    lines = [_cells(["base, not trained", *(base_cell(base, name) for name in MEASURES)], "base")]
    for row in rows:
        cells = [f"<td>{escape(row.label)}</td>"]
        for name in MEASURES:
            kind = "best" if winners[name] is row and len(rows) > 1 else "none" if name not in row.spreads else ""
            cells.append(f"<td class='{kind}'>{escape(cell(row, name))}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = "\n".join(lines)
    return (
        f"<div class='wide'><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        "<p class='about'>Bold: the best mean of its column.</p>"
    )


def _cells(texts: Sequence[str], kind: str) -> str:
    return f"<tr class='{kind}'>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"


def _failures(rows: Sequence[Row]) -> str:
    items = [f"<li>{escape(f'{row.label}, {failure}')}</li>" for row in rows for failure in row.failures]
    return f"<h2>Failed</h2>\n<ul>{''.join(items)}</ul>" if items else ""


def _drawing(title: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode("ascii")
    return f"<h2>{escape(title)}</h2>\n<img alt='{escape(title)}' src='data:image/svg+xml;base64,{data}'>"


def _options(plan: Plan) -> str:
    common = {**plan.common, "eval_data": plan.eval_data, "seeds": list(plan.seeds)}
    lines = [f"<tr><td>all</td><td><code>{escape(_listed(common))}</code></td></tr>"]
    for entry in plan.entries:
        lines.append(f"<tr><td>{escape(entry.label)}</td><td><code>{escape(_listed(entry.options))}</code></td></tr>")
    return f"<h2>Options</h2>\n<div class='wide'><table class='options'>{''.join(lines)}</table></div>"


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in options.items())


def _machines(rows: Sequence[Row], base: Result | None) -> str:
    results = [result for row in rows for result in row.results] + ([base] if base else [])
    names = sorted({result.machine for result in results if result.machine})
    return f"<h2>Where</h2>\n<p>{escape('; '.join(names))}</p>" if names else ""
