"""What an attention layer asks of a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with the options of the supported families.

    scale: factor on q.k; window: a query sees the last `window` keys, itself included (None: all);
    cap: soft cap c * tanh(score / c) (Gemma 2).
    """

    scale: float
    window: int | None = None
    cap: float | None = None
