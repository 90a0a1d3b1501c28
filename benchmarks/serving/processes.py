"""The parent's end of the contestants: each loads in its own process, and they play in turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from worker import Worker

from .metrics import Served
from .trace import Arrival

SCRIPT = Path(__file__).resolve().parent.parent / "serve_worker.py"


class Contestant(Worker):
    """A running `serve_worker.py`."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name, SCRIPT, [name, str(directory / "task.json")], directory)
        self.peak_bytes: int = self.ready

    def play(self, trace: Sequence[Arrival], run: str, limit: float | None = None) -> list[Served]:
        """The requests that it served, cut off or not."""
        answer = self.ask(json.dumps({"trace": trace, "run": run, "limit": limit}))
        self.peak_bytes = answer["peak_bytes"]
        return [Served(*row)._replace(times=tuple(row[3]), tokens=tuple(row[5])) for row in answer["served"]]
