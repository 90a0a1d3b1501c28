"""Random bases that are never stored: a hash of the global element index, and sums over bases in chunks.

Element e of basis i is (2 u - 255) / 256, where u is the top byte of the 32-bit word that number e hashes to under the
basis' key: 256 equally likely values between -1 and 1, symmetric, of variance (1 - 2^-16) / 3. All of it is integer
arithmetic, and every value is exact in bfloat16 already: the same bits on every device and library version. An element
depends on its own index alone, so a device that holds a slice of a factor draws just that slice.

A chunk of the basis is drawn once and meets the coefficients of all layers in one matrix product; backward it is drawn
again. On a CPU the product is then what costs: drawing takes about a third of the time for 18 rows of coefficients.

Shape legend: m rows of coefficients, k bases, *u units (input or output features of a linear), r columns of a factor.
Element number of (unit, column): unit * r + column.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jora.kernels.counter_hash import combine, fold_all, mix

VERSION = 1  # of everything above; files record it, since another hash would be another adapter
LEVELS = 256  # an element is an odd integer of -255..255 over this
CHUNK = 1 << 20  # elements of the basis in memory at a time: 4 MiB, which stays in a CPU's cache

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring element numbers differ in many bits


def basis_keys(seed: UInt32[Array, ""] | int, bases: int, *stream: Any) -> UInt32[Array, "*s k"]:
    """Keys of `bases` bases; the numbers of `stream` (or arrays [*s] of them) tell streams apart."""
    return combine(fold_all(seed, *stream)[..., None], jnp.arange(bases, dtype=jnp.uint32))


def basis(keys: UInt32[Array, " k"], elements: Int[Array, "*n"] | UInt32[Array, "*n"]) -> Float[Array, "k *n"]:
    """The bases themselves, fp32 and exact."""
    return _odd(keys, elements) / LEVELS


def uniform(keys: UInt32[Array, " m"], elements: Int[Array, "*n"] | UInt32[Array, "*n"]) -> Float[Array, "m *n"]:
    """One number in (-1, 1) a key and element: an odd integer over 2^24, exact in fp32."""
    odd = 2 * (_words(keys, elements) >> 8).astype(jnp.int32) - (2**24 - 1)
    return odd.astype(jnp.float32) * jnp.float32(2.0**-24)


def _words(keys: Array, elements: Array) -> UInt32[Array, "k *n"]:
    numbers = elements.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    return mix(numbers ^ keys.reshape(-1, *(1,) * elements.ndim))


def _odd(keys: Array, elements: Array) -> Float[Array, "k *n"]:
    """2 u - 255: the bases times LEVELS."""
    return (2 * (_words(keys, elements) >> 24).astype(jnp.int32) - (LEVELS - 1)).astype(jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_combination(
    coefficients: Float[Array, "m k"], keys: UInt32[Array, " k"], units: Int[Array, "*u"], rank: int, chunk: int = CHUNK
) -> Float[Array, "r m *u"]:
    """sum_i coefficients[m, i] * basis i, for all units and columns, fp32.

    At most about `chunk` elements of the basis exist at a time (at least one for every unit). Gradients flow to the
    coefficients alone: <dL/dout, basis i>, from a basis that is drawn again. Units may be cut over devices: each draws
    and sums its own, and only the gradient, [m, k], is exchanged.
    """
    m, k = coefficients.shape
    key_parts = _parts(keys, units, chunk)
    # What pads the last part has coefficient 0.
    padded = jnp.pad(coefficients.astype(jnp.float32) / LEVELS, ((0, 0), (0, key_parts.size - k)))
    rows = jnp.moveaxis(padded.reshape(m, *key_parts.shape), 1, 0)
    zero = jnp.zeros((m, *units.shape), jnp.float32)

    def column(_: None, number: Array) -> tuple[None, Array]:
        def add(total: Array, part: Any) -> tuple[Array, None]:
            some, some_keys = part
            return total + _product(some, _odd(some_keys, _elements(units, rank, number)), ((1,), (0,))), None

        return None, jax.lax.scan(add, zero, (rows, key_parts))[0]

    return jax.lax.scan(column, None, jnp.arange(rank, dtype=jnp.uint32))[1]


def _forward(coefficients: Array, keys: Array, units: Array, rank: int, chunk: int) -> tuple[Array, Any]:
    return linear_combination(coefficients, keys, units, rank, chunk), (coefficients, keys, units)


def _backward(rank: int, chunk: int, saved: Any, gradient: Float[Array, "r m *u"]) -> tuple[Array, None, None]:
    coefficients, keys, units = saved
    m, k = coefficients.shape
    key_parts = _parts(keys, units, chunk)
    over = tuple(range(1, gradient.ndim - 1))  # the units

    def column(total: Array, given: Any) -> tuple[Array, None]:
        number, of_column = given

        def one(_: None, some_keys: Array) -> tuple[None, Array]:
            return None, _product(of_column, _odd(some_keys, _elements(units, rank, number)), (over, over))

        return total + jax.lax.scan(one, None, key_parts)[1], None

    zero = jnp.zeros((key_parts.shape[0], m, key_parts.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(column, zero, (jnp.arange(rank, dtype=jnp.uint32), gradient))
    return (jnp.moveaxis(total, 0, 1).reshape(m, -1)[:, :k] / LEVELS).astype(coefficients.dtype), None, None


linear_combination.defvjp(_forward, _backward)


def _elements(units: Array, rank: int, column: Array) -> UInt32[Array, "*u"]:
    return units.astype(jnp.uint32) * jnp.uint32(rank) + column


def _parts(keys: Array, units: Array, chunk: int) -> UInt32[Array, "parts size"]:
    """The keys in the fewest parts, of equal size, whose bases keep to the chunk; the last is padded."""
    fitting = max(1, chunk // math.prod(units.shape))
    parts = -(-keys.size // fitting)
    return jnp.pad(keys, (0, -keys.size % parts)).reshape(parts, -1)


def _product(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    # Not in reduced precision: factors must agree between kinds of devices.
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=jax.lax.Precision.HIGHEST)
