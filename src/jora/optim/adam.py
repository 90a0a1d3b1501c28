"""Adam's direction with moments of a chosen storage; the arithmetic is fp32 whatever is stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jora.optim.blockwise import BLOCK, SMALLEST, Quantised, dequantise, quantise

Moments = Literal["float32", "bfloat16", "int8"]
# A leaf's path, like "weights.q_proj" -> leading axes that its 8-bit blocks must not cross.
KeepAxes = Callable[[str], int]


class AdamState(NamedTuple):
    """`mu` and `nu` have the parameters' structure; a leaf is an array or `Quantised`."""

    step: Int[Array, ""]
    mu: Any
    nu: Any


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    moments: Moments = "float32",
    keep: KeepAxes = lambda path: 0,
    at_once: int | None = None,
) -> optax.GradientTransformation:
    """M / (sqrt(V) + eps) with bias correction (arXiv 1412.6980), fp32 for gradients of any dtype.

    moments: how M and V are stored between steps. "int8" is block-wise with bitsandbytes' code books, signed
    for M and unsigned for V; leaves of fewer than 4096 elements stay fp32. keep: see `KeepAxes`; by default
    blocks run over the whole flattened leaf. at_once: tables [rows, columns] of more elements are gone through
    some columns at a time, so that temporaries stay small.
    """

    def init(params: Any) -> AdamState:
        def zeros(path: Any, leaf: Any) -> Any:
            return _zeros(leaf.shape, moments, keep(path_name(path)))

        mu, nu = (jax.tree_util.tree_map_with_path(zeros, params) for _ in range(2))
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(gradients: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        count = state.step + 1
        structure: Any
        leaves, structure = jax.tree.flatten(gradients)
        done = []
        moments = (structure.flatten_up_to(tree) for tree in (state.mu, state.nu))
        for g, m, v in zip(leaves, *moments, strict=True):
            parts = _parts(g, at_once)
            whole = partial(_leaf, count=count, b1=b1, b2=b2, eps=eps)
            done.append(whole(g, m, v) if parts == 1 else _in_columns(whole, parts, g, m, v))
        directions, mu, nu = (structure.unflatten([each[i] for each in done]) for i in range(3))
        return directions, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _leaf(
    gradient: Array, mu: Any, nu: Any, count: Array, b1: float, b2: float, eps: float
) -> tuple[Float[Array, "..."], Any, Any]:
    g = gradient.astype(jnp.float32)
    m = b1 * read(mu, signed=True) + (1 - b1) * g
    v = b2 * read(nu, signed=False) + (1 - b2) * g * g
    direction = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps)
    return direction, _write(m, mu, signed=True), _write(v, nu, signed=False)


def _parts(gradient: Array, at_once: int | None) -> int:
    """Into how many groups of columns a leaf is cut; a group holds whole blocks."""
    if at_once is None or gradient.ndim != 2 or gradient.size <= at_once or gradient.shape[1] % BLOCK:
        return 1
    blocks = gradient.shape[1] // BLOCK
    return next(n for n in range(1, blocks + 1) if blocks % n == 0 and (n == blocks or gradient.size <= n * at_once))


def _in_columns(
    whole: Callable[..., Any], parts: int, gradient: Array, mu: Any, nu: Any
) -> tuple[Float[Array, "..."], Any, Any]:
    """`whole(gradient, mu, nu)` a group of columns at a time; moments are overwritten in place."""

    def step(number: Array, carry: Any) -> Any:
        def slices(tree: Any) -> Any:
            def one(x: Array) -> Array:
                size = x.shape[1] // parts
                return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=1)

            return jax.tree.map(one, tree)

        new = apart(lambda old, g: whole(g, old[1], old[2]), number, slices(carry), slices(gradient))
        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[1], axis=1), carry, new
        )

    return jax.lax.fori_loop(0, parts, step, (jnp.zeros(gradient.shape, jnp.float32), mu, nu))


def apart(update: Callable[..., Any], number: Any, old: Any, *more: Any) -> Any:
    """update(old, *more), which is like `old`, computed from slices that exist by themselves.

    Else a slice of one stack is read inside the update of another, which may run later than its own stack's
    update: the compiler then copies whole stacks, every layer. A barrier says so; XLA's CPU compiler drops
    barriers before it fuses, but not a condition on what it cannot know.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(number >= 0, update, lambda old, *_: old, old, *more)
    return update(*jax.lax.optimization_barrier((old, *more)))


def _zeros(shape: tuple[int, ...], moments: Moments, keep: int) -> Any:
    if moments != "int8" or math.prod(shape) < SMALLEST:
        return jnp.zeros(shape, jnp.float32 if moments == "int8" else moments)
    blocks = -(-math.prod(shape[keep:]) // BLOCK)
    # A block of largest magnitude 0 reads as 0, whatever its codes.
    return Quantised(jnp.zeros(shape, jnp.uint8), jnp.zeros((*shape[:keep], blocks), jnp.float32))


def read(stored: Any, *, signed: bool) -> Float[Array, "..."]:
    """A stored moment as fp32."""
    return dequantise(stored, signed=signed) if isinstance(stored, Quantised) else stored.astype(jnp.float32)


def _write(value: Float[Array, "..."], like: Any, *, signed: bool) -> Any:
    if isinstance(like, Quantised):
        return quantise(value, signed=signed, keep=like.absmax.ndim - 1)
    return value.astype(like.dtype)


def path_name(path: Any) -> str:
    """A leaf's path as text, like "weights.q_proj"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
