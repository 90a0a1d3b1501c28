"""First values of LoRA's factors, under the names of PEFT's `init_lora_weights`.

True           A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0
"gaussian"     A ~ N(0, 1/r^2), B = 0
"orthogonal"   A = U Q_odd / 10, B = Q_even^T V / 10 with U, V ~ N(0, 1) and Q a random orthogonal [r, r]: the rows
               of Q_odd and Q_even are orthogonal, so A B = 0 although neither factor is; r must be even

An embedding's A is 0 and its B ~ N(0, 1). Layers may have different ranks: what pads them is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.models.tensors import LinearShape

Init = bool | str
Pair = dict[str, Array]  # "a": [layers?, *in, r], "b": [layers?, r, *out]


def first_factors(key: Array, init: Init, shape: LinearShape, ranks: int | Sequence[int]) -> Pair:
    """fp32 A and B of one target. ranks: of each layer (0: not adapted), or one rank where there are no layers."""
    if isinstance(ranks, int):
        pair = first_factors(key, init, shape, (ranks,))
        return {name: factor[0] for name, factor in pair.items()}
    if init == "orthogonal":
        return _orthogonal_stack(key, shape, ranks)
    largest = max(ranks)
    drawn = (len(ranks), *shape.in_shape, largest)
    if init == "gaussian":
        deviation = jnp.array([1.0 / max(rank, 1) for rank in ranks], jnp.float32)
        a = jax.random.normal(key, drawn, jnp.float32) * deviation.reshape(-1, *(1,) * (len(drawn) - 1))
    else:
        bound = 1.0 / math.sqrt(shape.in_size)
        a = jax.random.uniform(key, drawn, jnp.float32, -bound, bound)
    b = jnp.zeros((len(ranks), largest, *shape.out_shape), jnp.float32)
    return {"a": jnp.where(_true(ranks, a.ndim), a, 0.0), "b": b}


def first_embedding(key: Array, shape: LinearShape, rank: int) -> Pair:
    """A [vocab, r] = 0 and B [r, width] ~ N(0, 1)."""
    normal = jax.random.normal(key, (rank, *shape.out_shape), jnp.float32)
    return {"a": jnp.zeros((*shape.in_shape, rank), jnp.float32), "b": normal}


def _true(ranks: Sequence[int], ndim: int) -> Array:
    """[layers, 1..., r]: which components are not padding."""
    return jnp.arange(max(ranks)) < jnp.array(ranks).reshape(-1, *(1,) * (ndim - 1))


def _orthogonal_stack(key: Array, shape: LinearShape, ranks: Sequence[int]) -> Pair:
    layers, largest = len(ranks), max(ranks)
    a = jnp.zeros((layers, shape.in_size, largest), jnp.float32)
    b = jnp.zeros((layers, largest, shape.out_size), jnp.float32)
    for rank in sorted({rank for rank in ranks if rank}):
        keys = jax.random.split(jax.random.fold_in(key, rank), layers)
        more_a, more_b = jax.vmap(lambda k, rank=rank: _orthogonal(k, shape, rank))(keys)
        here = jnp.array([r == rank for r in ranks]).reshape(-1, 1, 1)
        a = jnp.where(here, jnp.pad(more_a, ((0, 0), (0, 0), (0, largest - rank))), a)
        b = jnp.where(here, jnp.pad(more_b, ((0, 0), (0, largest - rank), (0, 0))), b)
    return {
        "a": a.reshape(layers, *shape.in_shape, largest),
        "b": b.reshape(layers, largest, *shape.out_shape),
    }


def _orthogonal(key: Array, shape: LinearShape, rank: int) -> tuple[Float[Array, "i r"], Float[Array, "r o"]]:
    turn, left, right = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(turn, (rank, rank), jnp.float32))
    a = jax.random.normal(left, (shape.in_size, rank // 2), jnp.float32) @ q[0::2] / 10
    b = q[1::2].T @ jax.random.normal(right, (rank // 2, shape.out_size), jnp.float32) / 10
    return a, b
