"""Progress of long work: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jora.reporting import Reporter
from jora.ui.facts import duration, facts, rate
from jora.ui.memory import memory

LINE_EVERY_S = 10.0  # a log file wants a line now and then
MEMORY_EVERY_S = 1.0  # reading it costs a system call


@dataclass
class _Work:
    """One piece of work that has started and not finished."""

    what: str
    unit: str
    total: int | None
    started: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)
    before: int = 0  # done by an earlier run
    done: int = 0
    task: TaskID | None = None

    @classmethod
    def named(cls, total: int | None, what: str, done: int) -> _Work:
        name, _, unit = what.partition(",")
        return cls(name.strip(), unit.strip(), total, before=done, done=done)

    @property
    def here(self) -> int:
        """Units done since the start."""
        return self.done - self.before

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    @property
    def count(self) -> str:
        of = "" if self.total is None else f"/{self.total}"
        return f"{self.done}{of} {self.unit}".rstrip()

    def left(self) -> str:
        if not self.total or not self.here:
            return ""
        return f"{duration((self.total - self.done) * self.seconds / self.here)} left"

    def closing(self, fields: dict[str, float | int | str]) -> str:
        count = f"{self.here} {self.unit} in ".replace("  ", " ") if self.here else ""
        told = facts(fields)
        return f"{self.what}: {count}{duration(self.seconds)}{', ' if told else ''}{told}"


class PlainReporter:
    """Whole lines, never a carriage return: one when work starts, one now and then, one when it ends."""

    def __init__(self, stream: TextIO, every_s: float = LINE_EVERY_S) -> None:
        self._stream = stream
        self._every_s = every_s
        self._stack: list[_Work] = []

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        """Begin a piece of work, inside the one that is under way if there is one."""
        work = _Work.named(total, what, done)
        self._stack.append(work)
        self._say(f"{work.what}: {total} {work.unit or 'to do'}" if total is not None else f"{work.what} ...")

    def update(self, done: int, **fields: float | int | str) -> None:
        """A line when the last one is long enough ago."""
        work = self._stack[-1]
        work.done = done
        if time.monotonic() - work.shown < self._every_s:
            return
        work.shown = time.monotonic()
        parts = [work.count, rate(work.here / work.seconds), facts(fields), f"memory {memory()}", work.left()]
        self._say(f"{work.what}: {', '.join(filter(None, parts))}")

    def note(self, text: str) -> None:
        """One line."""
        self._say(text)

    def finish(self, **fields: float | int | str) -> None:
        """The closing line."""
        self._say(self._stack.pop().closing(fields))


class LiveReporter:
    """A bar for each piece of work under way, with its rate, fields, memory and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stack: list[_Work] = []
        self._progress: Progress | None = None
        self._memory = ""
        self._memory_at = 0.0

    def _bars(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[told]}", style="dim"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self._progress

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        """Draw a bar; it pulses when the total is unknown."""
        work = _Work.named(total, what, done)
        self._stack.append(work)
        work.task = self._bars().add_task(escape(work.what), total=total, completed=done, told="")

    def update(self, done: int, **fields: float | int | str) -> None:
        """Move the bar."""
        work = self._stack[-1]
        work.done = done
        if time.monotonic() - self._memory_at > MEMORY_EVERY_S:
            self._memory, self._memory_at = memory(), time.monotonic()
        told = ", ".join(filter(None, [facts(fields), rate(work.here / work.seconds), self._memory]))
        assert work.task is not None
        self._bars().update(work.task, completed=done, told=escape(told))

    def note(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, **fields: float | int | str) -> None:
        """Take the bar away and leave its closing line."""
        work = self._stack.pop()
        assert work.task is not None
        self._bars().remove_task(work.task)
        if not self._stack:
            self.close()
        self.note(work.closing(fields))

    def close(self) -> None:
        """Give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def reporter_for(stream: TextIO) -> Iterator[Reporter]:
    """A live display where `stream` is a terminal, plain lines where it is a file or a pipe."""
    if not stream.isatty():
        yield PlainReporter(stream)
        return
    live = LiveReporter(Console(file=stream))
    try:
        yield live
    finally:
        live.close()
