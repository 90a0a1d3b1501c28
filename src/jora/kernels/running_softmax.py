"""Softmax attention over keys that come a block at a time (arXiv 1805.02867): what both kinds of cache are read with.

Shape legend: b rows, k KV heads, q queries of a KV head (g query heads times s new tokens), t keys of a block, h head
width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jora.kernels.spec import AttentionSpec
from jora.kernels.widen import widen

MASKED = -1e30


class Running(NamedTuple):
    """A softmax in progress: largest score, sum of exponentials, weighted sum of values; fp32."""

    largest: Float[Array, "b k q"]
    total: Float[Array, "b k q"]
    values: Float[Array, "b k q h"]


def grouped(q: Float[Array, "b s k g h"]) -> Float[Array, "b k q h"]:
    """Queries under their KV head."""
    return jnp.moveaxis(q, 1, 3).reshape(q.shape[0], q.shape[2], -1, q.shape[4])


def begin(queries: Float[Array, "b k q h"]) -> Running:
    """A softmax over no keys."""
    zero = jnp.zeros(queries.shape[:3], jnp.float32)
    return Running(jnp.full_like(zero, MASKED), zero, jnp.zeros(queries.shape, jnp.float32))


def fold(
    running: Running,
    queries: Float[Array, "b k q h"],
    keys: Float[Array, "b t k h"],
    values: Float[Array, "b t k h"],
    visible: Bool[Array, "b s t"],
    spec: AttentionSpec,
) -> Running:
    """The softmax over more keys; `spec.window` is not read."""
    b, k, q, _ = queries.shape
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("bkqh,btkh->bkqt", *widen(queries, keys)) * spec.scale
    if spec.cap is not None:
        scores = spec.cap * jnp.tanh(scores / spec.cap)
    seen = jnp.broadcast_to(visible[:, None, None], (b, k, q // visible.shape[1], *visible.shape[1:]))
    seen = seen.reshape(scores.shape)
    scores = jnp.where(seen, scores, MASKED)
    largest = jnp.maximum(running.largest, scores.max(axis=-1))
    # Where nothing is visible yet, largest is MASKED too and the exponential would be 1.
    weights = jnp.where(seen, jnp.exp(scores - largest[..., None]), 0)
    shrink = jnp.exp(running.largest - largest)
    added = product("bkqt,btkh->bkqh", *widen(weights.astype(values.dtype), values))
    return Running(largest, running.total * shrink + weights.sum(axis=-1), running.values * shrink[..., None] + added)


def finish(running: Running, like: Float[Array, "b s k g h"]) -> Float[Array, "b s k g h"]:
    """The attention's output, shaped and typed like the queries; 0 for one that saw nothing."""
    b, s, k, g, h = like.shape
    out = running.values / jnp.where(running.total > 0, running.total, 1)[..., None]
    return jnp.moveaxis(out.reshape(b, k, g, s, h), 3, 1).astype(like.dtype)
