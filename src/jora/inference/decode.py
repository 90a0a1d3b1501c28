"""The two device programs of generation: prefill of a batch of prompts, and a run of decode steps.

Shape legend: b rows, p padded prompt length, t cache slots, c tokens of one run.

A program is compiled once for each (rows, prompt length, slots) and these are bucketed by the caller; how
many tokens are wanted, sampling options and end tokens are data. The cache is donated from run to run.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jora.inference.sampling import Sampling, is_one_of, sample
from jora.kernels import gpu_compiler
from jora.methods.method import Adapter, State
from jora.models import decoder, head
from jora.models.adapted import BASE, Bound, Rows
from jora.models.cache import Cache, new_cache
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.params import Params
from jora.sharding import Layout

RUN = 32  # tokens a run may add before the host looks (progress, stop strings)
NOTHING = -1  # where a row generated no token, because it had ended


class Program(NamedTuple):
    """The static part; hashable, so that equal programs share one compilation."""

    config: ModelConfig
    layout: Layout
    method: Any  # None: the base alone


class Stream(NamedTuple):
    """A batch in the middle of generation. `last` is chosen but not yet in the cache."""

    cache: Cache
    last: Int[Array, " b"]
    ended: Bool[Array, " b"]
    made: Int[Array, " b"]  # tokens generated so far: keys a row's random draws


@partial(jax.jit, static_argnames=("program", "slots"), compiler_options=gpu_compiler.OPTIONS)
def prefill(
    params: Params,
    state: State | None,
    tokens: Int[Array, "b p"],
    lengths: Int[Array, " b"],
    sampling: Sampling,
    ends: Int[Array, " e"],
    instance: Float[Array, "b h"] | None = None,
    answers: head.Answers | None = None,
    *,
    program: Program,
    slots: int,
) -> tuple[Stream, Int[Array, "b 1"], Float[Array, "b n"] | None]:
    """Read prompts, padded on the right, and choose each row's first token; -log p of `answers`.

    A row may go on after its prompt (of `lengths` tokens) with an answer to score: what generation adds takes its
    place in the cache. A row of length 0 only fills the batch: it has ended from the start. instance: a vector of each
    prompt, for methods that ask for one.
    """
    config, layout, _ = program
    bound, rows = bind(program, state, instance)
    params = weights(program, state, params)
    cache = new_cache(config, layout, tokens.shape[0], slots, params.embed.dtype)
    tokens = layout.constrain(tokens, "batch", None)
    hidden, filled = decoder.forward(params, config, layout, tokens, bound=bound, rows=rows, cache=cache)
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    last_hidden = jnp.take_along_axis(hidden, at, axis=1)
    stream = Stream(filled.advance(lengths), lengths * 0, lengths == 0, lengths * 0)
    stream = _choose(last_hidden, stream, params, bound, rows, sampling, ends, program)
    nll = None if answers is None else head.answer_loss(params, config, layout, hidden, answers, bound, rows)[1]
    return stream, _shown(stream, lengths == 0)[:, None], nll


@partial(jax.jit, static_argnames="program", donate_argnames="stream", compiler_options=gpu_compiler.OPTIONS)
def decode(
    params: Params,
    state: State | None,
    stream: Stream,
    sampling: Sampling,
    ends: Int[Array, " e"],
    limit: Int[Array, ""],
    instance: Float[Array, "b h"] | None = None,
    *,
    program: Program,
) -> tuple[Stream, Int[Array, "b c"]]:
    """Up to `limit` (at most RUN) more tokens a row; stops early when every row has ended."""
    config, layout, _ = program
    bound, rows = bind(program, state, instance)
    params = weights(program, state, params)

    def wanted(carry: tuple[Array, Stream, Array]) -> Array:
        step, stream, _ = carry
        return (step < limit) & ~jnp.all(stream.ended)

    def step_once(carry: tuple[Array, Stream, Array]) -> tuple[Array, Stream, Array]:
        step, stream, out = carry
        before = stream.ended
        tokens = layout.constrain(stream.last[:, None], "batch", None)
        hidden, cache = decoder.forward(params, config, layout, tokens, bound=bound, rows=rows, cache=stream.cache)
        # An ended row stays where it is and overwrites one slot that nobody reads again.
        stream = stream._replace(cache=cache.advance((~before).astype(jnp.int32)))
        stream = _choose(hidden, stream, params, bound, rows, sampling, ends, program)
        return step + 1, stream, out.at[:, step].set(_shown(stream, before))

    out = jnp.full((stream.last.shape[0], RUN), NOTHING, jnp.int32)
    _, stream, out = jax.lax.while_loop(wanted, step_once, (jnp.int32(0), stream, out))
    return stream, out


def ready(model: Model, adapter: Adapter | None) -> Adapter | None:
    """The adapter as all programs of a call use it. Raises InputError where it was made for another model."""
    method, _ = model.parts_of(adapter)
    return adapter if method is None else method.for_inference(adapter)


def bind(program: Program, state: State | None, instance: Float[Array, "b h"] | None = None) -> tuple[Bound, Rows]:
    """The adapter's projections, inside jit, and what they may depend on: no dropout."""
    rows = Rows(instance=None if instance is None else program.layout.constrain(instance, "batch", None))
    return (BASE if program.method is None else program.method.bind(state, rows)), rows


def weights(program: Program, state: State | None, params: Params) -> Params:
    """The weights that the forward pass reads, inside jit: the model's, or some that the method trained."""
    return params if program.method is None else program.method.base(state, params)


def _choose(
    hidden: Array,
    stream: Stream,
    params: Params,
    bound: Bound,
    rows: Rows,
    sampling: Sampling,
    ends: Int[Array, " e"],
    program: Program,
) -> Stream:
    """Pick the next token from hidden states [b, 1, d]."""
    scores = head.logits(params, program.config, program.layout, hidden, bound, rows)[:, 0]
    chosen = jnp.where(stream.ended, stream.last, sample(scores, sampling, stream.made))
    return stream._replace(last=chosen, ended=stream.ended | is_one_of(chosen, ends), made=stream.made + 1)


def _shown(stream: Stream, ended_before: Bool[Array, " b"]) -> Int[Array, " b"]:
    return jnp.where(ended_before, NOTHING, stream.last)
