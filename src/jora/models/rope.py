"""Rotary position embedding (RoFormer, arXiv 2104.09864), in Hugging Face's half-split layout, fp32."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jora.models.config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles."""

    cos: Float[Array, "b s half"]
    sin: Float[Array, "b s half"]


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angle per position of each of the head_dim / 2 planes, float32, scaled as `rope.kind` says."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(frequencies, rope)
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, rope: Rope) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    # Full turns within the original context: few turns -> stretched, many -> kept, between -> blended.
    turns = rope.original / wavelength
    blend = (turns - rope.low) / (rope.high - rope.low)
    mixed = (1 - blend) * frequencies / rope.factor + blend * frequencies
    return np.where(turns < rope.low, frequencies / rope.factor, np.where(turns > rope.high, frequencies, mixed))


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "b s"]) -> Rotation:
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "b s *heads h"], rotation: Rotation) -> Float[Array, "b s *heads h"]:
    """Turn each plane (i, i + h/2) of `x` by its angle; computed in fp32, returned in x's dtype."""
    heads = (1,) * (x.ndim - 3)
    cos, sin = (a.reshape(*a.shape[:2], *heads, a.shape[-1]) for a in rotation)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
