"""The parent's end of the contestants: each loads in its own process, and they play in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .metrics import Served
from .trace import Arrival

WORKER = Path(__file__).resolve().parent.parent / "serve_worker.py"


class Contestant:
    """A running `serve_worker.py`; nothing computes in it until it is asked to play."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._log = directory / f"{name.replace(':', '-')}.log"
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), name, str(directory / "task.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        self.peak_bytes: int = self._read()["ready"]

    def play(self, trace: Sequence[Arrival], run: str, limit: float | None = None) -> list[Served]:
        """The requests that it served, cut off or not."""
        assert self._process.stdin
        print(json.dumps({"trace": trace, "run": run, "limit": limit}), file=self._process.stdin, flush=True)
        answer = self._read()
        self.peak_bytes = answer["peak_bytes"]
        return [Served(*row)._replace(times=tuple(row[3]), tokens=tuple(row[5])) for row in answer["served"]]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}:\n{self._log.read_text()[-3000:]}")
        return json.loads(line)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
