"""metrics.jsonl: one JSON object a line, readable while the run goes on. A power loss may cut the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from jora.data.formats import json_objects
from jora.files import atomic_write

Line = dict[str, Any]
RATE_STEPS = 10  # tokens/s is over this many steps: a step that is read late would distort its own rate


class MetricsFile:
    """The measurements of a run, in the file and in `history`.

    A training line has `step` (finished optimiser steps, from 1), `epoch` (from 0), `loss` (mean nats per
    answer token of the step), `learning_rate`, `grad_norm` (before clipping), `tokens` (without padding)
    and `answer_tokens` of the step, `tokens_per_s` (over the last `RATE_STEPS`), `memory_bytes` (peak of the
    fullest device; on a CPU what the process holds) and `seconds` since the run began, interruptions left
    out. An evaluation's line has `step`, `eval_loss`, `eval_answer_tokens`, `best` and `seconds`.
    """

    def __init__(self, path: Path, keep_until: int = 0, *, written: bool = True) -> None:
        """Open `path`; lines of steps after `keep_until` are dropped: a resumed run makes them again.

        So is a last line that is not JSON: it was cut. Raises InputError where another one is not. written: off where
        another process writes the file.
        """
        self.history: list[Line] = []
        self._file: TextIO | None = None
        if path.exists() and keep_until:
            _drop_cut_line(path)
            self.history = [line for _, line in json_objects(path) if line["step"] <= keep_until]
        if not written:
            return
        with atomic_write(path) as temporary:
            temporary.write_text("".join(map(_text, self.history)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Seconds on the last line."""
        return self.history[-1]["seconds"] if self.history else 0.0

    def write(self, line: Line) -> None:
        """Append a line and flush it."""
        self.history.append(line)
        if self._file is not None:
            self._file.write(_text(line))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _drop_cut_line(path: Path) -> None:
    """Remove a last line that is not whole: the checkpoint has what a run needs to go on."""
    content = path.read_bytes().rstrip()
    begin = content.rfind(b"\n") + 1
    try:
        json.loads(content[begin:])
    except ValueError:  # not JSON, or zeros where nothing had been written yet
        with atomic_write(path) as temporary:
            temporary.write_bytes(content[:begin])


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"
