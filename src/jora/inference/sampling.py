"""From logits to the next token, on the device, seeded per request.

Filters apply in the order of transformers: temperature, top-k, top-p, min-p. A row's draw depends on its
own seed and on how many tokens it has generated, not on the other rows of its batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jora.errors import InputError
from jora.kernels.counter_hash import combine, mix

REMOVED = -1e30  # a filtered token's logit: its probability is exactly 0 in fp32
COLD = 1e-5  # temperatures below it are greedy, as in vLLM: logits divided by less may overflow
BLOCKS = 512  # of a row of logits, whose maxima are found first
CANDIDATES = 1024  # likeliest tokens among which top-k and top-p first look for their thresholds


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


def argmax(x: Float[Array, "b n"]) -> Int[Array, " b"]:
    """The index of each row's largest value, the first of equal ones: jnp.argmax, thirty times faster on a CPU.

    XLA's reduction over pairs is slow there, and collects a row that is cut over devices. So one plain maximum a block
    reads the row once, and pairs are reduced over the blocks, and within one.
    """
    blocks = math.gcd(x.shape[1], BLOCKS)
    if blocks < BLOCKS // 16:  # a vocabulary of an odd size
        blocks = BLOCKS
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % blocks)), constant_values=-jnp.inf)
    blocked = x.reshape(x.shape[0], blocks, -1)
    block = jnp.argmax(jnp.max(blocked, axis=-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocked, block[:, None, None], axis=1)[:, 0], axis=-1)
    return (block * blocked.shape[-1] + within).astype(jnp.int32)


def gumbel(seed: UInt32[Array, " b"], step: Int[Array, " b"], n: int) -> Float[Array, "b n"]:
    """Standard Gumbel noise of a row's seed and step and an element's index alone; fp32, in [-2.9, 22.9]."""
    row = combine(seed, step)
    bits = mix(row[:, None] ^ combine(jnp.uint32(0), jnp.arange(n, dtype=jnp.uint32)))
    # Small uniform numbers become large noise: log1p keeps all of their 32 bits.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def largest_cut(
    values: Float[Array, "b n"], weights: Float[Array, "b n"] | float, least: Float[Array, " b"]
) -> Float[Array, "b 1"]:
    """The largest t for which the weights of the values >= t add up to `least`; -inf where not even all of them do.

    Found bit by bit in the order of fp32 numbers: 32 passes, and no sort (at a vocabulary of 262,144 a twentieth of
    a sort's time on a CPU; and across devices only sums travel).
    """

    def number(key: UInt32[Array, " b"]) -> Float[Array, "b 1"]:
        bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(1 << 31), ~key)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    def lower_bit(i: Array, key: UInt32[Array, " b"]) -> UInt32[Array, " b"]:
        trial = key | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(values >= number(trial), weights, 0.0), axis=-1) >= least
        return jnp.where(reached, trial, key)

    key = jax.lax.fori_loop(0, 32, lower_bit, jnp.zeros(values.shape[0], jnp.uint32))
    found, tiny = number(key), jnp.finfo(jnp.float32).tiny
    # A CPU takes subnormal numbers for zero, so the search ends somewhere among them.
    found = jnp.where(jnp.abs(found) < tiny, jnp.where(key >> 31 == 1, 0.0, -tiny)[:, None], found)
    # Keys below that of -inf are NaNs.
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def rank_threshold(
    logits: Float[Array, "b vocab"], likeliest: Float[Array, "b n"], sampling: Sampling
) -> tuple[Float[Array, "b 1"], Bool[Array, " b"]]:
    """(the smallest logit that top-k and then top-p keep, whether the n largest logits sufficed to find it).

    top-k: the k-th largest; k = 0 keeps all. top-p: the smallest of the likeliest whose mass, of what top-k left,
    reaches p; p = 1 keeps all.
    """
    k, p = sampling.top_k, sampling.top_p
    kth = largest_cut(likeliest, 1.0, k.astype(jnp.float32))
    kth = jnp.where((k == 0)[:, None], -jnp.inf, kth)
    total = jax.nn.logsumexp(jnp.where(logits >= kth, logits, -jnp.inf), axis=-1, keepdims=True)
    share = jnp.where(likeliest >= kth, jnp.exp(likeliest - total), 0.0)
    nucleus = jnp.where((p >= 1)[:, None], -jnp.inf, largest_cut(likeliest, share, p))
    held = jnp.where(k == 0, (p >= 1) | (jnp.sum(share, axis=-1) >= p), k <= likeliest.shape[-1])
    return jnp.maximum(kth, nucleus), held


def min_p_threshold(logits: Float[Array, "b vocab"], p: Float[Array, " b"]) -> Float[Array, "b 1"]:
    """The logit of a token p times as likely as the likeliest."""
    return jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)[:, None]


def filtered(logits: Float[Array, "b vocab"], sampling: Sampling) -> Float[Array, "b vocab"]:
    """Logits after temperature and filters; what softmax makes of them is the distribution drawn from.

    Logits equal to a threshold stay, so that ties are not broken by their order.
    """
    drawn = sampling.temperature >= COLD
    logits = logits / jnp.where(drawn, sampling.temperature, 1.0)[:, None]
    count = min(CANDIDATES, logits.shape[-1])

    def by_rank(logits: Array) -> Array:
        threshold, held = rank_threshold(logits, jax.lax.top_k(logits, count)[0], sampling)
        if count == logits.shape[-1]:
            return threshold
        # A nucleus of more tokens than that is rare (high temperatures), and costs four times as much.
        return jax.lax.cond(
            jnp.all(held | ~wanted), lambda: threshold, lambda: rank_threshold(logits, logits, sampling)[0]
        )

    wanted = drawn & ((sampling.top_k > 0) | (sampling.top_p < 1))
    unranked = jnp.full((logits.shape[0], 1), -jnp.inf, jnp.float32)
    threshold = jax.lax.cond(jnp.any(wanted), by_rank, lambda _: unranked, logits)
    return jnp.where(logits >= jnp.maximum(threshold, min_p_threshold(logits, sampling.min_p)), logits, REMOVED)


def sample(
    logits: Float[Array, "b vocab"], sampling: Sampling, step: Int[Array, " b"] | Int[Array, ""]
) -> Int[Array, " b"]:
    """The next token of each row. logits: fp32; step: tokens that the row has generated so far."""

    drawing = sampling.temperature >= COLD
    greedy = argmax(logits)

    def draw(logits: Array) -> Int[Array, " b"]:
        steps = jnp.broadcast_to(step, sampling.seed.shape)
        noisy = filtered(logits, sampling) + gumbel(sampling.seed, steps, logits.shape[-1])
        return jnp.where(drawing, argmax(noisy), greedy)

    return jax.lax.cond(jnp.any(drawing), draw, lambda _: greedy, logits)


def is_one_of(tokens: Int[Array, " b"], ids: Int[Array, " e"]) -> Bool[Array, " b"]:
    """Which tokens are among `ids`."""
    return jnp.any(tokens[:, None] == ids[None], axis=-1)
