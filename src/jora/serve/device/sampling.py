"""The sampling program: logits to the next token of every row of the decode batch, on the device.

Shape legend: b rows, v vocabulary, w = ceil(v / 32) words of 32 tokens' bits (token t is bit t % 32 of word t // 32).

In order: logit bias, penalties (repetition, frequency, presence), ends forbidden before min_tokens, grammar mask,
temperature, top-k, top-p, min-p, draw. What no active row asks for is not computed. Log probabilities and ranks are of
the model's own distribution, before all of these, as OpenAI's API and vLLM (by default) report them.

Logits may arrive cut over devices along the vocabulary: only a greedy row's maximum travels, and sums of a pass; the
likeliest candidates of a row with top-k, top-p or logprobs are collected.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt16, UInt32

from jora.inference.sampling import COLD, Sampling, argmax
from jora.inference.sampling import sample as draw
from jora.serve.requests import MAX_LOGPROBS
from jora.sharding import Layout

FORBIDDEN = -1e20  # an end before min_tokens: below every logit, and above what a grammar excludes (-inf)
MOST_COUNTED = 2**16 - 1


class SampleState(NamedTuple):
    """What the device remembers of each row. 2 bytes a word of the vocabulary and row and an eighth of one for the
    prompt's bits: 8.5 MiB at 16 rows and 262,144 words, 136 MiB at 256 rows, cut over the devices as the logits are.
    """

    last: Int[Array, " b"]  # the token that the next decode step reads
    counts: UInt16[Array, "b v"]  # how often each token was generated, at most MOST_COUNTED
    prompt: UInt32[Array, "b w"]  # which tokens the prompt has


class SampleRows(NamedTuple):
    """What each row asks for; see `jora.serve.requests.SamplingOptions`. Only `step` changes from step to step.

    step: tokens generated so far; it keys the draw. ends: the tokens that end the row, -1 elsewhere, forbidden while
    step < min_tokens. bias_ids: tokens whose logits get `bias` added, -1 elsewhere. logprobs: does it want them?
    """

    sampling: Sampling
    step: Int[Array, " b"]
    presence: Float[Array, " b"]
    frequency: Float[Array, " b"]
    repetition: Float[Array, " b"]
    min_tokens: Int[Array, " b"]
    ends: Int[Array, "b e"]
    bias_ids: Int[Array, "b n"]
    bias: Float[Array, "b n"]
    logprobs: Bool[Array, " b"]


class Sampled(NamedTuple):
    """The chosen tokens; the rest is 0 unless some active row wants logprobs. rank: 1 is the likeliest."""

    token: Int[Array, " b"]
    logprob: Float[Array, " b"]
    rank: Int[Array, " b"]
    top: Int[Array, "b t"]  # the t = MAX_LOGPROBS likeliest, best first
    top_logprobs: Float[Array, "b t"]


def new_state(rows: int, vocabulary: int, layout: Layout) -> SampleState:
    """The state of rows that have not started."""

    def zeros(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Array:
        return jnp.zeros(shape, dtype, device=layout.sharding(axes, shape))

    return SampleState(
        zeros((rows,), jnp.int32, None),
        zeros((rows, vocabulary), jnp.uint16, None, "vocab"),
        zeros((rows, -(-vocabulary // 32)), jnp.uint32, None, None),
    )


@partial(jax.jit, static_argnames="layout", donate_argnames="state")
def start_row(
    state: SampleState,
    slot: Int[Array, ""] | int,
    prompt: UInt32[Array, " w"],
    counts: UInt16[Array, " v"] | None = None,
    *,
    layout: Layout,
) -> SampleState:
    """Row `slot` begins with this prompt. counts: of tokens generated already, where an answer is taken up again."""
    known = jnp.uint16(0) if counts is None else counts
    return _laid(
        state._replace(counts=state.counts.at[slot].set(known), prompt=state.prompt.at[slot].set(prompt)), layout
    )


@partial(jax.jit, static_argnames="layout", donate_argnames="state")
def sample(
    logits: Float[Array, "b v"],
    state: SampleState,
    rows: SampleRows,
    active: Bool[Array, " b"],
    mask: UInt32[Array, "b w"] | None = None,
    *,
    layout: Layout,
) -> tuple[SampleState, Sampled]:
    """The next token of each active row; other rows stay as they are. logits: fp32; mask: bits of allowed tokens."""
    sampled = _choose(logits, state.counts, state.prompt, rows, active, mask, layout)
    sampled = sampled._replace(token=jnp.where(active, sampled.token, state.last))
    every = jnp.arange(active.shape[0], dtype=jnp.int32)
    state = state._replace(last=sampled.token, counts=_counted(state.counts, every, sampled.token, active))
    return _laid(state, layout), sampled


@partial(jax.jit, static_argnames="layout", donate_argnames="state")
def first(
    logits: Float[Array, "1 v"],
    state: SampleState,
    row: SampleRows,
    slot: Int[Array, ""] | int,
    mask: UInt32[Array, "1 w"] | None = None,
    *,
    layout: Layout,
) -> tuple[SampleState, Sampled]:
    """The token after a prefill, of row `slot` (after `start_row`) alone; `row` and the result have one row."""
    slots = jnp.asarray(slot, jnp.int32)[None]
    active = jnp.ones(1, bool)
    sampled = _choose(logits, state.counts[slots], state.prompt[slots], row, active, mask, layout)
    state = state._replace(
        last=state.last.at[slots].set(sampled.token), counts=_counted(state.counts, slots, sampled.token, active)
    )
    return _laid(state, layout), sampled


def _choose(
    logits: Float[Array, "b v"],
    counts: UInt16[Array, "b v"],
    prompt: UInt32[Array, "b w"],
    rows: SampleRows,
    active: Bool[Array, " b"],
    mask: UInt32[Array, "b w"] | None,
    layout: Layout,
) -> Sampled:
    def allowed(logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        return logits if mask is None else jnp.where(_bits(mask, logits.shape[1]), logits, -jnp.inf)

    def special() -> Int[Array, " b"]:
        return jax.lax.cond(
            jnp.any(changes),
            lambda: draw(allowed(adjusted(logits, counts, prompt, rows)), sampling, rows.step),
            lambda: draw(allowed(logits), sampling, rows.step),
        )

    # A free row draws nothing, whatever it asked for before.
    sampling = rows.sampling._replace(temperature=jnp.where(active, rows.sampling.temperature, 0.0))
    logits = layout.constrain(logits, None, "vocab")
    changes = (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)
    changes |= (rows.step < rows.min_tokens) | jnp.any(rows.bias_ids >= 0, axis=1)
    changes &= active
    greedy = argmax(allowed(logits))
    token = jax.lax.cond(jnp.any(changes | (sampling.temperature >= COLD)), special, lambda: greedy)
    return jax.lax.cond(
        jnp.any(active & rows.logprobs), lambda: described(logits, token), lambda: _undescribed(logits, token)
    )


def adjusted(
    logits: Float[Array, "b v"], counts: UInt16[Array, "b v"], prompt: UInt32[Array, "b w"], rows: SampleRows
) -> Float[Array, "b v"]:
    """Logits after bias, penalties, and with ends forbidden.

    Repetition (arXiv 1909.05858): logits of tokens of the prompt and the answer are divided where positive, multiplied
    where negative. Frequency and presence (OpenAI): of generated tokens, by their count and once.
    """
    vocabulary = logits.shape[1]
    row = jnp.arange(logits.shape[0])[:, None]

    def places(ids: Int[Array, "b n"], used: Bool[Array, "b #n"]) -> Int[Array, "b n"]:
        return jnp.where(used & (ids >= 0), ids, vocabulary)  # what lies outside is dropped

    logits = logits.at[row, places(rows.bias_ids, jnp.ones_like(row, bool))].add(rows.bias, mode="drop")
    repetition = rows.repetition[:, None]
    seen = (counts > 0) | _bits(prompt, vocabulary)
    penalised = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, penalised, logits)
    logits -= rows.frequency[:, None] * counts.astype(jnp.float32) + rows.presence[:, None] * (counts > 0)
    early = (rows.step < rows.min_tokens)[:, None]
    return logits.at[row, places(rows.ends, early)].set(FORBIDDEN, mode="drop")


def described(logits: Float[Array, "b v"], token: Int[Array, " b"]) -> Sampled:
    word = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    # Sums over a one-hot, not a gather: that would collect a vocabulary that is cut over devices.
    own = jnp.sum(jnp.where(word == token[:, None], logits, 0.0), axis=1)
    total = jax.nn.logsumexp(logits, axis=1)
    rank = 1 + jnp.sum(logits > own[:, None], axis=1, dtype=jnp.int32)
    values, top = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[1]))
    return Sampled(token, own - total, rank, top, values - total[:, None])


def _undescribed(logits: Float[Array, "b v"], token: Int[Array, " b"]) -> Sampled:
    top = jnp.zeros((logits.shape[0], min(MAX_LOGPROBS, logits.shape[1])), jnp.int32)
    return Sampled(token, jnp.zeros(token.shape), jnp.zeros_like(token), top, top.astype(jnp.float32))


def _bits(words: UInt32[Array, "b w"], vocabulary: int) -> Bool[Array, "b v"]:
    each = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return each.reshape(words.shape[0], -1)[:, :vocabulary] == 1


def _counted(
    counts: UInt16[Array, "b v"], slots: Int[Array, " n"], token: Int[Array, " n"], active: Bool[Array, " n"]
) -> UInt16[Array, "b v"]:
    before = counts[slots, token]
    return counts.at[slots, token].set(jnp.where(active & (before < MOST_COUNTED), before + 1, before))


def _laid(state: SampleState, layout: Layout) -> SampleState:
    return SampleState(
        layout.constrain(state.last, None),
        layout.constrain(state.counts, None, "vocab"),
        layout.constrain(state.prompt, None, None),
    )
