"""Before and after, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from jora.ui.facts import number

if TYPE_CHECKING:
    from jora.demo.run import Asked, DemoResult
    from jora.inference.evaluate import EvalResult

# Name in EvalResult -> what it is.
_ROWS = {
    "loss": "loss, nats per answer token",
    "f1": "answer F1",
    "exact_match": "exact match",
    "quote_share": "quotes that stand in the context",
    "answered": "reached an answer",
}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "none quoted"
    return number(round(value, 3)) if name == "loss" else f"{value:.1%}"


def comparison_table(before: EvalResult, after: EvalResult) -> Table:
    """One metric a row."""
    table = Table(title=f"{len(after.rows)} held-out questions", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    for name, label in _ROWS.items():
        table.add_row(label, _cell(name, getattr(before, name)), _cell(name, getattr(after, name)))
    return table


def _answers(asked: Asked, width: int) -> Columns:
    half = max(width // 2 - 1, 20)
    panels = [
        Panel(Text(text.strip() or "(nothing)"), title=title, width=half)
        for title, text in (("base", asked.base), ("tuned", asked.tuned))
    ]
    return Columns(panels, padding=(0, 1))


def print_demo(result: DemoResult, console: Console | None = None) -> None:
    """The table, one question with both answers, and where everything is."""
    console = console or Console()
    console.print(comparison_table(result.before, result.after))
    asked = result.asked
    console.print(Text(f"\nQuestion   {asked.question}"))
    console.print(Text(f"Documents  {'; '.join(asked.documents)}"))
    console.print(Text(f"Expected   {asked.reference}"))
    console.print(_answers(asked, console.width))
    console.print(Text(f"adapter (PEFT): {result.adapter}\ndata set:       {result.data}"), soft_wrap=True)
