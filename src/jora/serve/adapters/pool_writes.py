"""Writing an adapter's pages into the pool."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jora.serve.pages.allocator import NOBODY
from jora.serve.pages.layout import pool_sharding
from jora.sharding import Layout

PAGES = 32  # that one run of the program writes: it is compiled once, whatever adapters come


def write_pages(
    pool: Float[Array, "pages shards elements"],
    pages: Sequence[int],
    blocks: Shaped[np.ndarray, "n shards elements"],
    layout: Layout,
) -> Float[Array, "pages shards elements"]:
    """The pool (donated) with `blocks` in the pages of these numbers."""
    for start in range(0, len(pages), PAGES):
        some = blocks[start : start + PAGES]
        numbers = np.full(PAGES, NOBODY, np.int32)
        numbers[: len(some)] = pages[start : start + PAGES]
        if len(some) < PAGES:
            some = np.concatenate([some, np.zeros((PAGES - len(some), *some.shape[1:]), some.dtype)])
        pool = _write(pool, numbers, jax.device_put(some, pool_sharding(layout)))
    return pool


@partial(jax.jit, donate_argnums=0)
def _write(
    pool: Float[Array, "pages shards elements"], numbers: Int[Array, " n"], blocks: Float[Array, "n shards elements"]
) -> Float[Array, "pages shards elements"]:
    return pool.at[numbers].set(blocks)
