"""A contestant's process, as its parent sees it: asked and answering in lines of JSON, one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class Worker:
    """A running script. It says `{"ready": ...}` when it has loaded, and computes nothing until it is asked to."""

    def __init__(self, name: str, script: Path, arguments: list[str], directory: Path) -> None:
        self.name = name
        self._log = directory / f"{name.replace(':', '-')}.log"
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )
        self.ready: Any = self._read()["ready"]

    def ask(self, question: str) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        assert self._process.stdin
        print(question, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self._process.wait()}:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
