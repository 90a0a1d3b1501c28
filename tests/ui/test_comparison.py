"""The before/after table and the two answers."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from jora.demo.run import Asked, DemoResult
from jora.inference.evaluate import EvalResult
from jora.ui.comparison import print_demo


def shown(result: DemoResult) -> str:
    stream = io.StringIO()
    print_demo(result, Console(file=stream, width=100))
    return stream.getvalue()


def test_numbers_question_and_answers_are_shown():
    before = EvalResult(3.25, 0.0, 0.0625, None, 0.1, ())
    after = EvalResult(1.0625, 0.5, 0.75, 0.9, 1.0, ())
    asked = Asked("What does [x] do?", "It binds.", ("Names", "Scopes"), "no [idea]", "It binds.")
    lines = shown(DemoResult(before, after, asked, Path("run/adapter"), Path("data"))).splitlines()

    def row(label: str) -> list[str]:
        return next(line.split("│")[2:4] for line in lines if label in line and "│" in line)

    assert [cell.strip() for cell in row("loss")] == ["3.25", "1.062"]
    assert [cell.strip() for cell in row("answer F1")] == ["6.2%", "75.0%"]
    assert [cell.strip() for cell in row("exact match")] == ["0.0%", "50.0%"]
    assert [cell.strip() for cell in row("quotes")] == ["none quoted", "90.0%"]
    text = "\n".join(lines)
    assert "What does [x] do?" in text and "Names; Scopes" in text and "run/adapter" in text
    (answers,) = [line for line in lines if "no [idea]" in line]
    assert "It binds." in answers  # side by side
