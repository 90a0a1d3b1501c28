"""What a user chooses about training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, get_args

from jora.data.tokenise import OverLong
from jora.errors import InputError

Optimizer = Literal["adamw", "adamw8bit", "galore", "galore8bit"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How an adapter is trained; the defaults suit LoRA on a few hundred to a few thousand examples."""

    epochs: int = 1
    """Passes over the data; `max_steps` overrides it."""
    max_steps: int | None = None
    """Optimiser steps in all; the data is repeated as often as that takes."""
    batch_size: int = 8
    """Rows that go through the model at once, over all devices."""
    accumulation: int = 1
    """Batches whose gradients make one step; the result is that of one batch that many times larger."""
    learning_rate: float = 2e-4
    """The largest rate, reached at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls to 0 after the warm-up; constant stays."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises from 0, rounded up to whole steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of what trains."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the mean of squares."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    optimizer: Optimizer = "adamw"
    """AdamW, with moments in 8 bit (adamw8bit), or GaLore for the weights of method full, also in 8 bit."""
    galore_rank: int = 128
    """GaLore: rank of each layer's projected gradient; at most a matrix's smaller side."""
    galore_scale: float = 0.25
    """GaLore: what the learning rate is multiplied by for projected matrices."""
    galore_refresh: int = 200
    """GaLore: steps between new projections of a matrix."""
    galore_projection: Literal["float32", "bfloat16", "int8"] = "bfloat16"
    """GaLore: how a projection is stored."""
    galore_svd: Literal["exact", "randomised"] = "randomised"
    """GaLore: how a projection is computed; exact costs several times as much on large matrices."""
    galore_stagger: bool = True
    """GaLore: spread the new projections of all matrices over the steps between; off, all at the same step."""
    layerwise: bool = False
    """Method full: update each layer inside the backward pass, so that gradients of one layer exist at a time."""
    clip_projected: bool = False
    """With layerwise GaLore: clip by the norm of the projected gradients, which saves a second pass."""
    max_length: int = 2048
    """Most tokens of an example, and with packing the length of every row."""
    too_long: OverLong = "shorten"
    """Longer examples: shorten their documents (never the answer), drop them, or stop with an error."""
    packing: bool = False
    """Put several examples in a row, kept apart; off, examples of similar length share a batch."""
    remat: Literal["auto", "none", "selective", "full"] = "auto"
    """What is computed again in the backward pass to save memory; auto takes the least that fits."""
    seed: int = 0
    """Of the adapter's first values, the order of the data and dropout."""
    eval_every: int | None = None
    """Steps between evaluations, where there is data for it; by default one at the end of each epoch."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a lower loss; by default never."""
    save_every: int = 200
    """Steps between checkpoints; there is one at the end, at a new best and on Ctrl-C in any case."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept, besides the best."""
    resume: bool = False
    """Continue the run in the output directory from its latest checkpoint."""
    deterministic: bool = False
    """On a GPU: only operations that give the same bits every time (slower). A CPU always does."""
    log_every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, (rule, fits) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not _fits(value, fits):
                raise InputError(f"training option {name} is {value}: it must be {rule}")
        if self.clip_projected and not (self.layerwise and self.optimizer.startswith("galore")):
            raise InputError("training option clip_projected: only a layerwise GaLore step has a projected norm")
        if self.layerwise and self.accumulation > 1 and self.max_grad_norm and not self.clip_projected:
            raise InputError(
                "training option layerwise: with accumulation the whole gradient never exists, so its norm is not "
                "known: set clip_projected (GaLore), or max_grad_norm to 0"
            )
        if self.layerwise and self.accumulation > 1 and not self.optimizer.startswith("galore"):
            raise InputError(
                "training option layerwise: accumulating whole gradients needs the memory that it saves: use "
                "accumulation 1, or optimizer galore"
            )


_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("a whole number, at least 1", lambda value: index(value) >= 1)
_NOT_NEGATIVE: _Rule = ("0 or more", lambda value: 0 <= value < float("inf"))
_SHARE: _Rule = ("at least 0 and less than 1", lambda value: 0 <= value < 1)
_ABOVE_ZERO: _Rule = ("a number above 0", lambda value: 0 < value < float("inf"))


def _fits(value: Any, fits: Callable[[Any], bool]) -> bool:
    try:
        return fits(value)
    except TypeError:  # not even a number
        return False


def _one_of(*values: str) -> _Rule:
    return f"one of {', '.join(values)}", lambda value: value in values


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("epochs", "max_steps", "batch_size", "accumulation"), _POSITIVE),
    **dict.fromkeys(("eval_every", "patience", "save_every", "keep_checkpoints", "log_every"), _POSITIVE),
    **dict.fromkeys(("galore_rank", "galore_refresh"), _POSITIVE),
    **dict.fromkeys(("learning_rate", "epsilon", "galore_scale"), _ABOVE_ZERO),
    **dict.fromkeys(("warmup", "beta1", "beta2"), _SHARE),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NOT_NEGATIVE),
    "max_length": ("a whole number, at least 2", lambda value: index(value) >= 2),
    "seed": ("a whole number, at least 0 and below 2**32", lambda value: 0 <= index(value) < 2**32),
    "schedule": _one_of("cosine", "linear", "constant"),
    "optimizer": _one_of(*get_args(Optimizer)),
    "galore_projection": _one_of("float32", "bfloat16", "int8"),
    "galore_svd": _one_of("exact", "randomised"),
    "too_long": _one_of("shorten", "drop", "error"),
    "remat": _one_of("auto", "none", "selective", "full"),
}
