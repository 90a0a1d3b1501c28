"""Causal attention in plain XLA, blocked over queries: the reference, and the path for CPUs.

A block of queries meets only the keys that it may see: everything up to its own end, or for a window the
last `window + block`. Scores exist for one block at a time, forward and backward (they are recomputed).

Shape legend: b rows, s queries, t keys, k KV heads, g query heads per KV head, h head width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jora.kernels.spec import AttentionSpec
from jora.kernels.widen import widen

BLOCK = 256  # queries a block; at 256 x 4096 fp32 scores of one head take 4 MiB
UNROLLED_BLOCKS = 8  # more blocks than this are looped over in bands, so that compile time stays bounded
MASKED = -1e30  # not -inf: a row of padding may see no key at all, and must stay finite


def scores_to_output(
    q: Float[Array, "b s k g h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    visible: Bool[Array, "#b s t"],
    spec: AttentionSpec,
) -> Float[Array, "b s k g h"]:
    """Softmax attention over explicitly given visibility; fp32 scores."""
    q, k = widen(q, k)
    scores = jnp.einsum("bskgh,btkh->bkgst", q, k, preferred_element_type=jnp.float32) * spec.scale
    if spec.cap is not None:
        scores = spec.cap * jnp.tanh(scores / spec.cap)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights, v)


def visibility(
    queries: Int[Array, "#b s"],
    keys: Int[Array, "#b t"],
    window: int | Int[Array, ""] | None,
    query_segments: Int[Array, "b s"] | None = None,
    key_segments: Int[Array, "b t"] | None = None,
) -> Bool[Array, "#b s t"]:
    """Which key index each query index may see: causal, within the window, in the same segment."""
    distance = queries[:, :, None] - keys[:, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]
    return visible


def blocked_attention(
    q: Float[Array, "b s k g h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    segments: Int[Array, "b s"] | None,
    spec: AttentionSpec,
) -> Float[Array, "b s k g h"]:
    """Causal self-attention of whole sequences, queries and keys at the same indices."""
    length = q.shape[1]
    blocks = -(-length // BLOCK)
    per_band = -(-blocks // UNROLLED_BLOCKS)
    outputs = []
    for start in range(0, length, per_band * BLOCK):
        stop = min(start + per_band * BLOCK, length)
        outputs.append(_band(q, k, v, segments, spec, start, stop))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _band(q: Array, k: Array, v: Array, segments: Array | None, spec: AttentionSpec, start: int, stop: int) -> Array:
    """Queries [start, stop): one block, or a loop over blocks that share their span of keys."""
    first = 0 if spec.window is None else max(0, start - spec.window + 1)
    if stop - start <= BLOCK:
        return _block(q[:, start:stop], k, v, segments, spec, start, first, stop - first)
    padding = -(stop - start) % BLOCK
    queries = jnp.pad(q[:, start:stop], ((0, 0), (0, padding), (0, 0), (0, 0), (0, 0)))
    blocks = queries.reshape(q.shape[0], -1, BLOCK, *q.shape[2:]).swapaxes(0, 1)
    span = stop if spec.window is None else min(stop, spec.window + BLOCK)

    def step(_: None, item: tuple[Array, Array]) -> tuple[None, Array]:
        index, block = item
        begin = start + index * BLOCK
        from_key = 0 if spec.window is None else jnp.clip(begin - spec.window + 1, 0, stop - span)
        return None, _block(block, k, v, segments, spec, begin, from_key, span)

    _, out = jax.lax.scan(step, None, (jnp.arange(blocks.shape[0]), blocks))
    return out.swapaxes(0, 1).reshape(queries.shape)[:, : stop - start]


def _block(
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    spec: AttentionSpec,
    begin: int | Array,
    first: int | Array,
    span: int,
) -> Array:
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def run(q: Array, k: Array, v: Array) -> Array:
        keys = jax.lax.dynamic_slice_in_dim(k, first, span, 1)
        values = jax.lax.dynamic_slice_in_dim(v, first, span, 1)
        query_index = (begin + jnp.arange(q.shape[1]))[None]
        key_index = (first + jnp.arange(span))[None]
        query_segments = key_segments = None
        if segments is not None:
            # The last block of a band may be padded beyond the sequence: those queries are cut off again.
            query_segments = jnp.take(segments, jnp.minimum(query_index[0], segments.shape[1] - 1), axis=1)
            key_segments = jax.lax.dynamic_slice_in_dim(segments, first, span, 1)
        visible = visibility(query_index, key_index, spec.window, query_segments, key_segments)
        return scores_to_output(q, keys, values, visible, spec)

    return run(q, k, v)
