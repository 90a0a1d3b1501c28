"""From logits to the next token, on the device, seeded per request.

Filters apply in the order of transformers: temperature, top-k, top-p, min-p. A row's draw depends on its
own seed and on how many tokens it has generated, not on the other rows of its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jora.errors import InputError

REMOVED = -1e30  # a filtered token's logit: its probability is exactly 0 in fp32


class Sampling(NamedTuple):
    """How each of b rows picks its next token.

    temperature: 0 is greedy. top_k: keep this many of the likeliest tokens, 0 all. top_p: keep the
    likeliest tokens up to this probability mass (nucleus sampling, arXiv 1904.09751), 1 all. min_p: drop
    tokens less likely than this share of the likeliest's probability (arXiv 2407.01082), 0 none.
    """

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]
    seed: UInt32[Array, " b"]


def sampling_rows(
    rows: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    """The same choice for every row, with seed 0. Raises InputError where a value is out of range."""
    if not temperature >= 0:
        raise InputError(f"temperature must be at least 0, found {temperature}")
    if top_k < 0:
        raise InputError(f"top_k must be at least 0 (0 keeps all tokens), found {top_k}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], found {top_p}")
    if not 0 <= min_p <= 1:
        raise InputError(f"min_p must be in [0, 1], found {min_p}")
    values = (np.float32(temperature), np.int32(top_k), np.float32(top_p), np.float32(min_p), np.uint32(0))
    return Sampling(*(jnp.full(rows, value) for value in values))


def top_k_threshold(descending: Float[Array, "b vocab"], k: Int[Array, " b"]) -> Float[Array, "b 1"]:
    """The k-th largest logit of each row, sorted downwards; k = 0 keeps all."""
    last = jnp.where(k == 0, descending.shape[-1], jnp.minimum(k, descending.shape[-1])) - 1
    return jnp.take_along_axis(descending, last[:, None], axis=-1)


def top_p_threshold(descending: Float[Array, "b vocab"], p: Float[Array, " b"]) -> Float[Array, "b 1"]:
    """The smallest of the likeliest logits whose mass reaches p, at least one of them; p = 1 keeps all."""
    mass = jnp.cumsum(jax.nn.softmax(descending, axis=-1), axis=-1)
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    kept = (before < p[:, None]) | (p >= 1)[:, None]
    return jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)


def min_p_threshold(logits: Float[Array, "b vocab"], p: Float[Array, " b"]) -> Float[Array, "b 1"]:
    """The logit of a token p times as likely as the likeliest."""
    return jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)[:, None]


def filtered(logits: Float[Array, "b vocab"], sampling: Sampling) -> Float[Array, "b vocab"]:
    """Logits after temperature and filters; what softmax makes of them is the distribution drawn from.

    Logits equal to a threshold stay, so that ties are not broken by their order.
    """
    warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    logits = logits / warm[:, None]

    def filter_all(logits: Array) -> Array:
        descending = jnp.sort(logits, axis=-1, descending=True)
        threshold = top_k_threshold(descending, sampling.top_k)
        among_k = jnp.where(descending >= threshold, descending, REMOVED)
        threshold = jnp.maximum(threshold, top_p_threshold(among_k, sampling.top_p))
        threshold = jnp.maximum(threshold, min_p_threshold(logits, sampling.min_p))
        return jnp.where(logits >= threshold, logits, REMOVED)

    wanted = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
    # Sorting a vocabulary of 262,144 costs more than the rest of the step: only where somebody asked.
    return jax.lax.cond(jnp.any(wanted), filter_all, lambda logits: logits, logits)


def sample(
    logits: Float[Array, "b vocab"], sampling: Sampling, step: Int[Array, " b"] | Int[Array, ""]
) -> Int[Array, " b"]:
    """The next token of each row. logits: fp32; step: tokens that the row has generated so far."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    steps = jnp.broadcast_to(step, greedy.shape)

    def draw(_: None) -> Int[Array, " b"]:
        def noise(seed: Array, step: Array) -> Array:
            return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[1:])

        drawn = jnp.argmax(filtered(logits, sampling) + jax.vmap(noise)(sampling.seed, steps), axis=-1)
        return jnp.where(sampling.temperature > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, lambda _: greedy, None)


def is_one_of(tokens: Int[Array, " b"], ids: Int[Array, " e"]) -> Bool[Array, " b"]:
    """Which tokens are among `ids`."""
    return jnp.any(tokens[:, None] == ids[None], axis=-1)
