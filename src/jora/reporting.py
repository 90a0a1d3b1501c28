"""How long work says how far it is, without knowing who listens.

Lower rooms take `reporter: Reporter = SILENT`; `jora.ui` has the ones that draw.
"""

from __future__ import annotations

from typing import Protocol


class Reporter(Protocol):
    """Told of each piece of long work: `start`, some `update`, `finish`.

    Work may start inside other work (an evaluation while training); `update` and `finish` are about the
    piece that started last.
    """

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        """Begin `what` ("training", "loading weights"), of `total` units; None when that is unknown.

        `what` may name its unit after a comma: "training, steps". `done` units are behind us already where work
        is taken up again: they count towards the total, not towards the rate.
        """

    def update(self, done: int, **fields: float | int | str) -> None:
        """Say that `done` units of the total are behind us (absolute, not an increment).

        Fields are shown beside the bar as "name value". A name ending in `_per_s` is a rate
        (`tokens_per_s=812.0` reads "812 tokens/s"), one ending in `_bytes` a size.
        """

    def note(self, text: str) -> None:
        """Say one line that stays: a count, a warning, a path that was written."""

    def finish(self, **fields: float | int | str) -> None:
        """End what `start` began; the fields stand in its closing line."""


class Silent:
    """Says nothing: the default everywhere."""

    def start(self, total: int | None, what: str, done: int = 0) -> None:
        """Ignore it."""

    def update(self, done: int, **fields: float | int | str) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def finish(self, **fields: float | int | str) -> None:
        """Ignore it."""


SILENT: Reporter = Silent()
