"""The two forward programs of serving: one decode step of all running rows, and one chunk of a prompt.

Shape legend: b rows of the decode batch, c tokens of a prompt's chunk, m soft-prompt slots.

Each is compiled once for each shape of its arguments: rows, chunk width, size of the active set. Lengths, which
adapter a row has and which pages it owns are data. The pool is donated and updated in place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels import gpu_compiler
from jora.models import decoder, head
from jora.models.adapted import BASE, Bound, Rows
from jora.models.config import ModelConfig
from jora.models.paged import POOL_AXES, PagedCache
from jora.models.params import Params
from jora.serve.adapters.active import Active
from jora.serve.adapters.projection import Expanded
from jora.serve.device.sampling import Sampled, described
from jora.serve.pages.layout import PoolLayout
from jora.sharding import Layout

SCORED = 32  # prompt tokens whose logits exist at a time; at 262,144 words and fp32 32 MiB

PromptScores = Sampled  # of a prompt's tokens, one row a position

Pool = Float[Array, "pages shards elements"]


class Program(NamedTuple):
    """The static part; hashable, so that equal programs share one compilation."""

    config: ModelConfig
    layout: Layout
    pool_layout: PoolLayout


class SoftPrompt(NamedTuple):
    """Vectors in place of the first embeddings; only `slots` of the m are there, so that all have one shape."""

    vectors: Float[Array, "m d"]
    slots: Int[Array, ""]


@partial(jax.jit, static_argnames="program", donate_argnames="pool", compiler_options=gpu_compiler.OPTIONS)
def decode(
    params: Params,
    active: Active | None,
    pool: Pool,
    tokens: Int[Array, " b"],
    lengths: Int[Array, " b"],
    numbers: Int[Array, " b"],
    tables: Int[Array, "groups b blocks"],
    expanded: Expanded | None = None,
    *,
    program: Program,
) -> tuple[Pool, Float[Array, "b vocab"]]:
    """One more token of every row: the pool with its keys and values, and fp32 logits of the next.

    lengths: tokens that a row has in the pool, so the position of this one; -1 where no sequence has the row (its
    logits mean nothing). numbers: of each row's adapter in `active`, -1 for the base. tables: see `PagedCache`.
    """
    bound = BASE if active is None else active.bind_decode(numbers, expanded)
    hidden, pool = _forward(params, bound, pool, tokens[:, None], tables, lengths[:, None], program)
    return pool, _logits(params, hidden, bound, program)[:, 0]


@partial(jax.jit, static_argnames="program", donate_argnames="pool", compiler_options=gpu_compiler.OPTIONS)
def prefill(
    params: Params,
    active: Active | None,
    pool: Pool,
    tokens: Int[Array, " c"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    number: Int[Array, ""],
    tables: Int[Array, "groups blocks"],
    expanded: Expanded | None = None,
    soft: SoftPrompt | None = None,
    following: Int[Array, " c"] | None = None,
    *,
    program: Program,
) -> tuple[Pool, Float[Array, "1 vocab"], PromptScores | None]:
    """The positions start .. start + count - 1 of one sequence; tokens beyond `count` are padding.

    Returns the pool, fp32 logits after the last of them and, with `following` (each position's next token), how
    likely those were, [c]. active: the part of the active set that holds its adapter (`active.part`). soft: the soft
    prompt that stands at the first positions, where tokens are not read.
    """
    bound = BASE if active is None else active.bind_decode(number[None], expanded)
    if soft is not None:
        bound = replace(bound, prefix=soft.vectors[None], prefix_slots=soft.slots)
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    positions = jnp.where(index < count, start + index, -1)
    hidden, pool = _forward(params, bound, pool, tokens[None], tables[:, None], positions[None], program)
    last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
    scores = None if following is None else _scores(params, hidden, following, bound, program)
    return pool, _logits(params, last, bound, program)[0], scores


def _forward(
    params: Params, bound: Bound, pool: Pool, tokens: Array, tables: Array, positions: Array, program: Program
) -> tuple[Float[Array, "b s d"], Pool]:
    config, layout, pool_layout = program
    cache = PagedCache(pool, tables, positions, pool_layout, layout)
    hidden, cache = decoder.forward(params, config, layout, tokens, bound=bound, rows=Rows(), cache=cache)
    return hidden, layout.constrain(cache.pool, *POOL_AXES)


def _logits(params: Params, hidden: Array, bound: Bound, program: Program) -> Float[Array, "b n vocab"]:
    return head.logits(params, program.config, program.layout, hidden, bound, Rows())


def _scores(
    params: Params, hidden: Float[Array, "1 c d"], following: Int[Array, " c"], bound: Bound, program: Program
) -> PromptScores:
    """How likely the next tokens are, a few positions at a time: [c, vocab] never exists."""
    count = following.shape[0]
    size = min(count, SCORED)
    padding = -count % size
    chunks = jnp.pad(hidden[0], ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[2])

    def score(chunk: tuple[Array, Array]) -> PromptScores:
        return described(_logits(params, chunk[0][None], bound, program)[0], chunk[1])

    scored = jax.lax.map(score, (chunks, jnp.pad(following, (0, padding)).reshape(-1, size)))
    return PromptScores(*(x.reshape(-1, *x.shape[2:])[:count] for x in scored))
