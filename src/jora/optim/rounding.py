"""Adding an update to weights of 16 bits without losing it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from jora.kernels.counter_hash import mix


def add(weight: Float[Array, "..."], change: Float[Array, "..."], seed: UInt32[Array, ""]) -> Float[Array, "..."]:
    """weight + change in the weight's dtype.

    bfloat16 is rounded stochastically (arXiv 1502.02551): a change far below the spacing of its 8 bits, as
    most are at the usual learning rates, then happens in expectation instead of never.
    """
    total = weight.astype(jnp.float32) + change.astype(jnp.float32)
    if weight.dtype != jnp.bfloat16:
        return total.astype(weight.dtype)
    counter = jnp.arange(math.prod(weight.shape), dtype=jnp.uint32).reshape(weight.shape)
    noise = mix(counter * jnp.uint32(0x9E3779B9) ^ seed) >> 16
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
    # Infinity and NaN stay what they are.
    rounded = jnp.where(jnp.isfinite(total), rounded, bits)
    return jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)
