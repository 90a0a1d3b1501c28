"""Random bits as a hash of a counter: the same on every device, mesh and library version.

A stateful or split-based generator would tie a draw to the shape and sharding of the array it is drawn
for. Here an element's bits depend on its own index and a seed only, so a shard computes just its slice,
and a resumed run draws what the first one drew.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32


def mix(x: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """The finaliser of MurmurHash3 (fmix32): a bijection in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def combine(seed: UInt32[Array, "*n"], value: UInt32[Array, "*n"] | Int[Array, "*n"] | int) -> UInt32[Array, "*n"]:
    """Fold one more number into a seed."""
    salt = jnp.asarray(value).astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x7F4A7C15)
    return mix(jnp.asarray(seed, jnp.uint32) ^ mix(salt))


def keep_mask(
    row_seeds: UInt32[Array, " b"],
    shape: tuple[int, ...],
    rate: float,
    tokens: Int[Array, "b s"] | None = None,
) -> Bool[Array, "b s *rest"]:
    """True with probability 1 - rate, for an array `shape` = (b, s, ...).

    An element's draw depends on its row's seed, its token's index in the row (`tokens`, by default counted
    from 0) and its feature's index: padding a row, or taking some of its tokens, changes no draw.
    """
    features = math.prod(shape[2:])
    if tokens is None:
        tokens = jnp.arange(shape[1], dtype=jnp.uint32)[None]
    feature = jnp.arange(features, dtype=jnp.uint32).reshape(1, 1, *shape[2:])
    wide = (1,) * (len(shape) - 2)
    counter = tokens.astype(jnp.uint32).reshape(*tokens.shape, *wide) * jnp.uint32(features) + feature
    bits = mix(counter * jnp.uint32(0x9E3779B9) ^ row_seeds.reshape(-1, 1, *wide))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def fold_all(seed: int | UInt32[Array, ""], *values: Any) -> UInt32[Array, "*n"]:
    """A seed from several numbers in order."""
    result = jnp.asarray(seed, jnp.uint32)
    for value in values:
        result = combine(result, value)
    return result


__all__ = ["combine", "fold_all", "keep_mask", "mix"]
