"""Block-wise 8-bit numbers: bitsandbytes' dynamic code book (arXiv 2110.02861), in blocks of 256.

A block is divided by its largest magnitude; each quotient is stored as the index of the nearest entry of a
table of 256, which has a moving exponent: seven decades, the finest steps near one.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 256
SMALLEST = 4096  # elements; a smaller tensor stays fp32, as in bitsandbytes


class Quantised(NamedTuple):
    """An array in 8 bits. `codes` has the array's shape; blocks run along its flattened last axes."""

    codes: UInt8[Array, "..."]
    absmax: Float[Array, "*kept blocks"]


@cache
def code_book(signed: bool) -> np.ndarray:
    """The 256 values, sorted, fp32: `bitsandbytes.functional.create_dynamic_map(signed)`."""
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = np.linspace(0.1, 1.0, parts + 1, dtype=np.float64)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*means, *-means] if signed else [*means]
    return np.sort(np.array(values, np.float32))


def quantise(x: Float[Array, "..."], *, signed: bool, keep: int = 0) -> Quantised:
    """Round to the code book. Blocks never cross the first `keep` axes; the last one of a row may be shorter."""
    book = code_book(signed)
    middles = (book[1:] + book[:-1]) / 2
    kept = x.shape[:keep]
    size = math.prod(x.shape[keep:])
    blocks = -(-size // BLOCK)
    rows = jnp.pad(x.astype(jnp.float32).reshape(*kept, size), ((0, 0),) * keep + ((0, blocks * BLOCK - size),))
    rows = rows.reshape(*kept, blocks, BLOCK)
    absmax = jnp.max(jnp.abs(rows), axis=-1)
    scaled = rows / jnp.where(absmax > 0, absmax, 1.0)[..., None]
    codes = _below(middles, scaled).astype(jnp.uint8)
    return Quantised(codes.reshape(*kept, blocks * BLOCK)[..., :size].reshape(x.shape), absmax)


def _below(middles: np.ndarray, x: Float[Array, "..."]) -> Int[Array, "..."]:
    """How many of 255 sorted numbers are below each x: a bisection.

    The first two looks are comparisons with constants. As gathers (`jnp.searchsorted`) they have constant indices,
    which XLA evaluates element by element when it compiles: seconds for each tensor of a large model. On a CPU this
    is 2.5 times as fast, too.
    """
    table = jnp.asarray(middles)
    found = jnp.where(x > middles[127], 128, 0)
    found += jnp.where(x > jnp.where(found > 0, middles[191], middles[63]), 64, 0)
    for step in (32, 16, 8, 4, 2, 1):
        found += jnp.where(x > table.at[found + (step - 1)].get(mode="promise_in_bounds"), step, 0)
    return found


def dequantise(x: Quantised, *, signed: bool) -> Float[Array, "..."]:
    """fp32, in the shape of the codes."""
    keep = x.absmax.ndim - 1
    kept, size = x.codes.shape[:keep], math.prod(x.codes.shape[keep:])
    scale = jnp.repeat(x.absmax, BLOCK, axis=-1)[..., :size]
    codes = x.codes.reshape(*kept, size).astype(jnp.int32)
    values = jnp.asarray(code_book(signed)).at[codes].get(mode="promise_in_bounds")
    return (values * scale).reshape(x.codes.shape)
