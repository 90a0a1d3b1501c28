"""The options of a LoRA adapter as words of a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jora.methods.lora import LoRA


@dataclass(frozen=True)
class LoraOptions:
    """The adapter."""

    rank: int = 16
    """Columns of A."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """all-linear, names of modules, or one regular expression; embed_tokens and lm_head may be named."""
    dropout: float = 0.0
    """Rate on the adapter's input."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules that differ: pattern and rank, in pairs."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of modules that differ: pattern and alpha, in pairs."""
    layers_to_transform: tuple[int, ...] = ()
    """Adapt these layers only; none means all."""
    exclude_modules: tuple[str, ...] = ()
    """Leave these out: names, or one regular expression."""

    def method(self) -> LoRA:
        """The method that these options describe."""
        from jora.methods.lora import LoRA

        return LoRA(
            rank=self.rank,
            alpha=self.alpha,
            targets=_one_or_all(self.targets),
            dropout=self.dropout,
            use_rslora=self.use_rslora,
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
            layers_to_transform=self.layers_to_transform or None,
            exclude_modules=_one_or_all(self.exclude_modules),
        )


def _one_or_all(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """A single word may be a regular expression, which PEFT's rules want as a string."""
    return words[0] if len(words) == 1 else words
