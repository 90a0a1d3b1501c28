"""Ctrl-C and SIGTERM between steps, not inside one: a step's state is donated, so half of one cannot be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interrupt:
    """`asked` turns true when the user has pressed Ctrl-C once (or a batch scheduler has sent SIGTERM); a second time
    interrupts at once.
    """

    asked: bool = False


@contextmanager
def delayed_interrupt() -> Iterator[Interrupt]:
    """Hold back the first signal to stop. Outside the main thread, where none arrives, nothing changes."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: object) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
