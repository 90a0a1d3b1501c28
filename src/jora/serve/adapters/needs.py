"""What the adapters of a directory need of the engine, for options that leave it to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jora.models.config import LINEARS
from jora.serve.adapters.describe import AdapterInfo
from jora.serve.options import EngineOptions

LEAST_PRODUCTS = 8  # of a bucket: IA3 and DoRA adapters have one each


def fitted(options: EngineOptions, adapters: Sequence[AdapterInfo]) -> EngineOptions:
    """The options with `targets`, `product_buckets` and `soft_tokens` filled in where they are None."""
    return replace(
        options,
        targets=_targets(adapters) if options.targets is None else options.targets,
        product_buckets=_products(adapters) if options.product_buckets is None else options.product_buckets,
        soft_tokens=_soft_tokens(adapters) if options.soft_tokens is None else options.soft_tokens,
    )


def _targets(adapters: Sequence[AdapterInfo]) -> tuple[str, ...]:
    """The linears that an adapter changes; all of them where there is none."""
    changed = {target for info in adapters for target in info.targets}
    return tuple(target for target in LINEARS if target in changed) or LINEARS


def _products(adapters: Sequence[AdapterInfo]) -> tuple[int, ...]:
    """One bucket, room for four of the adapters with the most base products; none where none has any."""
    most = max((info.spec.products for info in adapters), default=0)
    return (1 << (max(LEAST_PRODUCTS, 4 * most) - 1).bit_length(),) if most else ()


def _soft_tokens(adapters: Sequence[AdapterInfo]) -> int:
    return max((info.prefix_slots for info in adapters), default=0)
