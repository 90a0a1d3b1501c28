"""GaLore's projection of one matrix (arXiv 2403.03507, section 4): which side, from what, and stored how.

A matrix is [*in, *out], its heads apart. The smaller side is projected, the input side of a square: with
n = in <= out, P is [*in, r] and R = P^T G is [r, *out]; else P is [*out, r] and R = G P is [*in, r]. P has
the first r singular vectors of that side. (galore-torch stores [out, in] and tests rows >= columns: the
same choice.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jora.kernels.widen import widen

Factorisation = Literal["exact", "randomised"]
Precision = Literal["float32", "bfloat16", "int8"]

OVERSAMPLING = 8  # columns of the range finder beyond the rank (Halko et al., arXiv 0909.4061, section 4)
POWER_STEPS = 2  # gradients' singular values fall slowly: two power iterations keep the leading ones


class Int8Columns(NamedTuple):
    """P in 8 bits: each column, a unit vector, has its own scale."""

    codes: Int8[Array, "*side r"]
    scale: Float[Array, " r"]


@dataclass(frozen=True)
class Side:
    """How a matrix of this shape is projected: `shape` is [*in, *out] with `inputs` input axes."""

    shape: tuple[int, ...]
    inputs: int
    rank: int

    @property
    def projects_input(self) -> bool:
        return math.prod(self.shape[: self.inputs]) <= math.prod(self.shape[self.inputs :])

    @property
    def side_shape(self) -> tuple[int, ...]:
        """Axes that the projection replaces by the rank."""
        return self.shape[: self.inputs] if self.projects_input else self.shape[self.inputs :]

    @property
    def smaller(self) -> int:
        """Length of the projected side, the largest rank."""
        return math.prod(self.side_shape)

    @property
    def projected_shape(self) -> tuple[int, ...]:
        if self.projects_input:
            return (self.rank, *self.shape[self.inputs :])
        return (*self.shape[: self.inputs], self.rank)

    def project(self, p: Float[Array, "*side r"], gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        """R, fp32."""
        n = len(self.side_shape)
        if self.projects_input:
            return _dot(p, gradient, (tuple(range(n)), tuple(range(n))))
        return _dot(gradient, p, (tuple(range(self.inputs, len(self.shape))), tuple(range(n))))

    def expand(self, p: Float[Array, "*side r"], projected: Float[Array, "..."]) -> Float[Array, "..."]:
        """P R (or R P^T): a change of the whole matrix, fp32."""
        n = len(self.side_shape)
        if self.projects_input:
            return _dot(p, projected, ((n,), (0,)))
        return _dot(projected, p, ((self.inputs,), (n,)))

    def as_columns(self, gradient: Float[Array, "..."]) -> Float[Array, "side other"]:
        """The matrix in fp32 with the projected side first."""
        flat = gradient.astype(jnp.float32).reshape(math.prod(self.shape[: self.inputs]), -1)
        return flat if self.projects_input else flat.T


def _dot(a: Array, b: Array, axes: Any) -> Float[Array, "..."]:
    if a.dtype != b.dtype:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    left, right = widen(a, b)
    return jnp.tensordot(left, right, axes, preferred_element_type=jnp.float32)


def leading_vectors(
    matrix: Float[Array, "m n"], rank: int, factorisation: Factorisation, key: Any
) -> Float[Array, "m r"]:
    """The first `rank` (at most m, m <= n) left singular vectors, fp32, each with its largest element positive.

    The sign of a singular vector is arbitrary; fixing it makes the result the same on every backend, and a
    refresh of an unchanged gradient no change. "randomised": Halko's range finder, O(mnr) instead of
    O(mn min(m, n)); key: uint32 seed of its test matrix.
    """
    if factorisation == "exact" or rank + OVERSAMPLING >= min(matrix.shape):
        vectors = jnp.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    else:
        vectors = _range_finder(matrix, rank, key)
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None], axis=0)
    return vectors * jnp.where(largest < 0, -1.0, 1.0)


def _range_finder(matrix: Float[Array, "m n"], rank: int, key: Any) -> Float[Array, "m r"]:
    product = partial(jnp.matmul, precision="highest")  # a GPU's own default would leave P orthonormal to 1e-3
    test = jax.random.normal(jax.random.key(key), (matrix.shape[1], rank + OVERSAMPLING), jnp.float32)
    basis = jnp.linalg.qr(product(matrix, test))[0]
    for _ in range(POWER_STEPS):
        basis = jnp.linalg.qr(product(matrix, jnp.linalg.qr(product(matrix.T, basis))[0]))[0]
    inner = product(basis.T, matrix)
    # Its left singular vectors; an SVD of [rank, n] itself is the slowest part of all on a GPU.
    vectors = jnp.linalg.eigh(product(inner, inner.T))[1][:, ::-1]
    return product(basis, vectors[:, :rank])


def store(p: Float[Array, "*side r"], precision: Precision) -> Any:
    """P as it is kept between steps."""
    if precision != "int8":
        return p.astype(precision)
    scale = jnp.max(jnp.abs(p), axis=tuple(range(p.ndim - 1))) / 127.0
    codes = jnp.round(p / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8)
    return Int8Columns(codes, scale)


def read(stored: Any) -> Float[Array, "*side r"]:
    """P as it is used: both ways through the same rounded values."""
    return stored.codes * stored.scale if isinstance(stored, Int8Columns) else stored
