"""Which linears of the layers a method adapts, for methods that leave embeddings and output layer alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool

from jora.errors import InputError
from jora.methods.targets import select
from jora.models.config import LINEARS, ModelConfig


def layer_sites(
    method: str,
    config: ModelConfig,
    targets: str | Sequence[str],
    exclude: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
) -> dict[str, tuple[str, int]]:
    """{module name: (target, layer)}, as `targets.select` finds them. Raises InputError for embed_tokens or lm_head."""
    found = {}
    for name, (target, layer) in select(config, targets, exclude, layers).items():
        if layer is None:
            raise InputError(f"{method}: {target} cannot be adapted; targets may be {', '.join(LINEARS)}")
        found[name] = (target, layer)
    return found


def layer_masks(config: ModelConfig, sites: Iterable[tuple[str, int]]) -> dict[str, Bool[np.ndarray, " layers"]]:
    """{target: which of its layers are adapted}, for each target that is adapted somewhere."""
    masks: dict[str, np.ndarray] = {}
    for target, layer in sites:
        masks.setdefault(target, np.zeros(config.layers, bool))[layer] = True
    return masks
