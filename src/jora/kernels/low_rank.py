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

from jora.kernels.widen import product
from jora.sharding import Layout

TOKENS = ((0, 1), (0, 1))  # contract rows and tokens of both operands


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "b s *in"], a: Float[Array, "*in r"], b: Float[Array, "r *out"], layout: Layout
) -> Float[Array, "b s *out"]:
    """x A B. What devices exchange is [tokens, rank] alone (see `Layout`)."""
    return _forward(x, a, b, layout)[0]


def _forward(x: Array, a: Array, b: Array, layout: Layout) -> tuple[Array, Any]:
    inner = product(x, a.astype(x.dtype), (_from(2, x.ndim), _from(0, a.ndim - 1)))
    inner = layout.constrain(inner.astype(x.dtype), "batch", None, None)
    return product(inner, b.astype(x.dtype), ((2,), (0,)), x.dtype), (x, inner, a, b)


def _backward(layout: Layout, saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    d_inner = product(gradient, b.astype(x.dtype), (_from(2, gradient.ndim), _from(1, b.ndim)))
    d_inner = layout.constrain(d_inner.astype(x.dtype), "batch", None, None)
    d_b = product(inner, gradient, TOKENS)
    d_a = jnp.moveaxis(product(d_inner, x, TOKENS), 0, -1)
    d_x = product(d_inner, a.astype(x.dtype), ((2,), (a.ndim - 1,)), x.dtype)
    return d_x, d_a.astype(a.dtype), d_b.astype(b.dtype)


def _from(start: int, stop: int) -> tuple[int, ...]:
    return tuple(range(start, stop))


low_rank.defvjp(_forward, _backward)
