"""Operands of a product whose sums are kept in fp32."""

from __future__ import annotations

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
