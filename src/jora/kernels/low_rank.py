"""The product x A B of a low-rank adapter, with a backward pass written for it.

Left to autodiff, the gradient of B is a product whose *wide* operand (the output's gradient, [tokens, out])
is transposed first. Here the narrow one is: [tokens, rank]. On a CPU that alone halves a LoRA backward pass.
The factors stay fp32; products run in x's dtype with fp32 sums, and the factors' gradients leave in fp32.

Shape legend: *in, *out dimensions of the site, r rank, b rows, s tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jora.kernels.widen import widen
from jora.sharding import Layout

TOKENS = ((0, 1), (0, 1))  # contract rows and tokens of both operands


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "b s *in"], a: Float[Array, "*in r"], b: Float[Array, "r *out"], layout: Layout
) -> Float[Array, "b s *out"]:
    """x A B. What devices exchange is [tokens, rank] alone (see `Layout`)."""
    return _forward(x, a, b, layout)[0]


def _forward(x: Array, a: Array, b: Array, layout: Layout) -> tuple[Array, Any]:
    inner = _product(x, a.astype(x.dtype), (_from(2, x.ndim), _from(0, a.ndim - 1)))
    inner = layout.constrain(inner.astype(x.dtype), "batch", None, None)
    return _product(inner, b.astype(x.dtype), ((2,), (0,))).astype(x.dtype), (x, inner, a, b)


def _backward(layout: Layout, saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    d_inner = _product(gradient, b.astype(x.dtype), (_from(2, gradient.ndim), _from(1, b.ndim)))
    d_inner = layout.constrain(d_inner.astype(x.dtype), "batch", None, None)
    d_b = _product(inner, gradient, TOKENS)
    d_a = jnp.moveaxis(_product(d_inner, x, TOKENS), 0, -1)
    d_x = _product(d_inner, a.astype(x.dtype), ((2,), (a.ndim - 1,)))
    return d_x.astype(x.dtype), d_a.astype(a.dtype), d_b.astype(b.dtype)


def _from(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


def _product(x: Array, y: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    """Sum over the paired dimensions, in fp32."""
    x, y = widen(x, y)
    return jax.lax.dot_general(x, y, (contract, ((), ())), preferred_element_type=jnp.float32)


low_rank.defvjp(_forward, _backward)
