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

from jora.sharding import Layout

TOKENS = ((0, 1), (0, 1))  # contract rows and tokens of both operands


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "b s *in"], a: Float[Array, "*in r"], b: Float[Array, "r *out"], layout: Layout
) -> Float[Array, "b s *out"]:
    """x A B. What devices exchange is [tokens, rank] alone (see `Layout`)."""
    return _forward(x, a, b, layout)[0]


def _forward(x: Array, a: Array, b: Array, layout: Layout) -> tuple[Array, Any]:
    inner = _dot(x, a.astype(x.dtype), a.ndim - 1)
    inner = layout.constrain(inner.astype(x.dtype), "batch", None, None)
    return _dot(inner, b.astype(x.dtype), 1).astype(x.dtype), (x, inner, a, b)


def _backward(layout: Layout, saved: Any, gradient: Array) -> tuple[Array, Array, Array]:
    x, inner, a, b = saved
    width = b.ndim - 1
    d_inner = jax.lax.dot_general(
        gradient,
        b.astype(x.dtype),
        ((tuple(range(2, 2 + width)), tuple(range(1, 1 + width))), ((), ())),
        preferred_element_type=jnp.float32,
    )
    d_inner = layout.constrain(d_inner.astype(x.dtype), "batch", None, None)
    d_b = jax.lax.dot_general(inner, gradient, (TOKENS, ((), ())), preferred_element_type=jnp.float32)
    d_a = jax.lax.dot_general(d_inner, x, (TOKENS, ((), ())), preferred_element_type=jnp.float32)
    d_x = jax.lax.dot_general(
        d_inner, a.astype(x.dtype), (((2,), (a.ndim - 1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return d_x.astype(x.dtype), jnp.moveaxis(d_a, 0, -1).astype(a.dtype), d_b.astype(b.dtype)


def _dot(x: Array, w: Array, inputs: int) -> Array:
    return jnp.tensordot(x, w, axes=inputs, preferred_element_type=jnp.float32)


low_rank.defvjp(_forward, _backward)
