"""Products whose sums are kept in fp32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def widen(*operands: Array) -> tuple[Array, ...]:
    """The operands of a product with an fp32 result: on a CPU as fp32, elsewhere as they are.

    Accelerators multiply 16-bit operands into fp32 sums; XLA's CPU runtime has no such product.
    """
    if jax.default_backend() != "cpu":
        return operands
    return tuple(x.astype(jnp.float32) for x in operands)


def product(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any = jnp.float32) -> Array:
    """Sum over the paired dimensions of x and y, in fp32, rounded to dtype; what is left of x, then of y."""
    x, y = widen(x, y)
    # An accelerator sums in fp32 whatever it writes: an fp32 array that another kernel then rounds would be waste.
    written = jnp.promote_types(x.dtype, dtype)
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=written).astype(dtype)
