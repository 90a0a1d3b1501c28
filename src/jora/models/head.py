"""The vocabulary: logits for sampling, and the loss of answer positions, both vocabulary-parallel.

In retrieval-augmented training most tokens carry no loss. Logits are made only where a token does, a chunk
at a time, and their gradient is taken in the same pass: the full [tokens, vocabulary] array never exists
and nothing of the vocabulary's width is kept for the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels.vocab import vocab_product
from jora.models.adapted import Bound, Dense, Projection, Rows, Site, project
from jora.models.config import ModelConfig
from jora.models.params import Params
from jora.sharding import Layout

CHUNK = 128  # answer tokens whose logits exist at a time; at 262,144 words and fp32 128 MiB
MASKED = -1e30
Static = tuple[ModelConfig, Layout]


class Answers(NamedTuple):
    """Where the loss is: position p predicts the token after it. Padding has weight 0."""

    positions: Int[Array, "b n"]
    targets: Int[Array, "b n"]
    weights: Float[Array, "b n"]


class Head(NamedTuple):
    """The differentiable parts of the output layer."""

    table: Float[Array, "v d"]
    projection: Projection | None


class TableDense(Dense):
    """The output layer: its weight is the vocabulary's table [v, d]."""

    def _product(self, x: Array) -> Array:
        return vocab_product(x, self.weight, self.layout)

    def column_norm(self, a: Float[Array, "d r"], b: Float[Array, "r v"]) -> Float[Array, " v"]:
        return Dense(self.weight.T, None, self.in_axes, self.out_axes, self.layout).column_norm(a, b)


def dense_of(params: Params, layout: Layout) -> TableDense:
    """The frozen output layer."""
    return _dense(params.embed if params.head is None else params.head, layout)


def _dense(table: Array, layout: Layout) -> TableDense:
    return TableDense(table, None, (None,), ("vocab",), layout)


def _head(params: Params, bound: Bound) -> Head:
    return Head(params.embed if params.head is None else params.head, bound.head)


def _padded_logits(
    head: Head, hidden: Float[Array, "b n d"], config: ModelConfig, layout: Layout, rows: Rows
) -> Float[Array, "b n v"]:
    """fp32 logits over the padded vocabulary; padding words can never win."""
    hidden = layout.constrain(hidden, "batch_gathered", None, None)
    dense = _dense(head.table, layout)
    site = Site("lm_head", jnp.int32(config.layers))
    logits = project(hidden, dense, head.projection, site, rows)
    logits = layout.constrain(logits, "batch_gathered", None, "vocab").astype(jnp.float32)
    if config.logit_cap is not None:
        logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
    words = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    return jnp.where(words < config.vocab_size, logits, MASKED)


def logits(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    hidden: Float[Array, "b n d"],
    bound: Bound,
    rows: Rows,
) -> Float[Array, "b n vocab"]:
    """Scores of the next token, fp32, of hidden states as `decoder.forward` returns them."""
    return _padded_logits(_head(params, bound), hidden, config, layout, rows)[..., : config.vocab_size]


def answer_loss(
    params: Params,
    config: ModelConfig,
    layout: Layout,
    hidden: Float[Array, "b s d"],
    answers: Answers,
    bound: Bound,
    rows: Rows,
) -> tuple[Float[Array, ""], Float[Array, "b n"]]:
    """(sum of weight * -log p, -log p of each answer token); fp32. Only the sum carries a gradient."""
    chosen = jnp.take_along_axis(hidden, answers.positions[..., None], axis=1, mode="clip")
    chosen = layout.constrain(chosen, "batch_gathered", None, None)
    return _chunked_loss(chosen, _head(params, bound), answers, rows, (config, layout))


def _nll(hidden: Array, head: Head, answers: Answers, rows: Rows, static: Static) -> tuple[Array, Array]:
    config, layout = static
    # What dropout draws belongs to a token, however the answers are cut into chunks.
    rows = rows._replace(tokens=answers.positions)
    scores = _padded_logits(head, hidden, config, layout, rows)
    words = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    # A sum over a one-hot, not a gather: a gather along the sharded vocabulary would collect the logits.
    target = jnp.sum(jnp.where(words == answers.targets[..., None], scores, 0.0), axis=-1)
    nll = jax.nn.logsumexp(scores, axis=-1) - target
    return jnp.sum(nll * answers.weights), nll


def _chunks(hidden: Array, answers: Answers) -> tuple[Array, Answers]:
    """Cut [b, n, ...] into [chunks, b, c, ...], padding n with answers of weight 0."""
    rows, count = answers.targets.shape
    size = min(count, max(1, CHUNK // rows))
    padding = -count % size

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows, -1, size, *x.shape[2:]).swapaxes(0, 1)

    return cut(hidden), Answers(*(cut(x) for x in answers))


def _join(x: Array, count: int) -> Array:
    """Undo `_chunks` for one array."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :count]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked_loss(hidden: Array, head: Head, answers: Answers, rows: Rows, static: Static) -> tuple[Array, Array]:
    def step(total: Array, chunk: tuple[Array, Answers]) -> tuple[Array, Array]:
        loss, nll = _nll(*_of(chunk, head), rows, static)
        return total + loss, nll

    total, nll = jax.lax.scan(step, jnp.float32(0), _chunks(hidden, answers))
    return total, _join(nll, answers.targets.shape[1])


def _of(chunk: tuple[Array, Answers], head: Head) -> tuple[Array, Head, Answers]:
    hidden, answers = chunk
    return hidden, head, answers


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _loss_forward(hidden: Any, head: Any, answers: Any, rows: Any, static: Static) -> tuple[Any, Any]:
    """The loss and its gradient in one pass over the chunks.

    Which parts of the head train is known here (`perturbed`): a frozen table gets no gradient at all.
    """
    value = partial(jax.tree.map, lambda leaf: leaf.value, is_leaf=_is_primal)
    leaves, structure = jax.tree.flatten(head, is_leaf=_is_primal)
    trains = [leaf.perturbed for leaf in leaves]
    hidden, answers, rows = value(hidden), value(answers), value(rows)
    values = [leaf.value for leaf in leaves]

    def loss_of(chunk: Array, trained: list[Array], chunk_answers: Answers) -> tuple[Array, Array]:
        merged = iter(trained)
        parts = [next(merged) if t else v for t, v in zip(trains, values, strict=True)]
        return _nll(chunk, jax.tree.unflatten(structure, parts), chunk_answers, rows, static)

    learned = [v for t, v in zip(trains, values, strict=True) if t]

    def step(carry: Any, chunk: tuple[Array, Answers]) -> tuple[Any, Any]:
        total, gradients = carry
        part, chunk_answers = chunk
        loss, pull, nll = jax.vjp(lambda h, p: loss_of(h, p, chunk_answers), part, learned, has_aux=True)
        d_hidden, d_trained = pull(jnp.ones_like(loss))
        return (total + loss, [g + d for g, d in zip(gradients, d_trained, strict=True)]), (d_hidden, nll)

    # Summed over the chunks in fp32, whatever a table's own type.
    start = (jnp.float32(0), [jnp.zeros(v.shape, jnp.float32) for v in learned])
    (total, gradients), (d_hidden, nll) = jax.lax.scan(step, start, _chunks(hidden, answers))
    count = answers.targets.shape[1]
    remaining = iter(g.astype(v.dtype) for g, v in zip(gradients, learned, strict=True))
    d_head = jax.tree.unflatten(structure, [next(remaining) if t else None for t in trains])
    return (total, _join(nll, count)), (_join(d_hidden, count), d_head)


def _loss_backward(static: Static, saved: Any, cotangents: Any) -> tuple[Any, Any, None, None]:
    scale, _ = cotangents
    d_hidden, d_head = jax.tree.map(lambda g: (scale * g).astype(g.dtype), saved)
    return d_hidden, d_head, None, None


_chunked_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)
