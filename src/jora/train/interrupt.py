"""Ctrl-C between steps, not inside one: a step's state is donated, so half of one cannot be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interrupt:
    """`asked` turns true when the user has pressed Ctrl-C once; a second time interrupts at once."""

    asked: bool = False


@contextmanager
def delayed_interrupt() -> Iterator[Interrupt]:
    """Hold back the first KeyboardInterrupt. Outside the main thread, where none arrives, nothing changes."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: object) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
