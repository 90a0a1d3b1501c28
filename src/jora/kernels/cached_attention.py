"""Attention over keys and values of all layers in one array each, and the writing of new ones: one device's part.

The arrays are written and read where they are. A scatter that is mapped over the rows would copy all layers' keys and
values in every layer, and one product over all slots of a cache is slow on a CPU: with four rows of 2,048 slots of
Gemma 3 270M (jax 0.10) a step took 620 ms so, and takes 57 (docs/log.md, 2026-11-24). Cost follows the longest row,
not the slots.

Shape legend: L layers, b rows, s new tokens a row, t cache slots, k KV heads, g query heads per KV head, h head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels import running_softmax as softmax
from jora.kernels.attention_xla import visibility
from jora.kernels.spec import AttentionSpec

# Keys a round. A CPU works on what its caches hold; elsewhere a round is a launch of kernels, so few of them.
CPU_BLOCK, BLOCK = 128, 2048


def write_slots(
    stack: Float[Array, "L b t k h"], layer: Int[Array, ""], new: Float[Array, "b s k h"], at: Int[Array, "b s"]
) -> Float[Array, "L b t k h"]:
    """Store new tokens' keys or values of one layer in their rows' slots; slots past the end are dropped."""
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    return stack.at[layer, rows, at].set(new.astype(stack.dtype), mode="drop")


def cached_attention(
    q: Float[Array, "b s k g h"],
    keys: Float[Array, "L b t k h"],
    values: Float[Array, "L b t k h"],
    layer: Int[Array, ""],
    at: Int[Array, "b s"],
    window: Int[Array, ""],
    spec: AttentionSpec,
) -> Float[Array, "b s k g h"]:
    """What new tokens in slots `at` see in a cache whose slot t holds token t of its row.

    window: the last keys that a query sees, itself included; data, so that layers of every kind share one program
    (`spec.window` is not read).
    """
    slots = keys.shape[2]
    size = min(slots, CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK)
    first = jnp.maximum(at - window + 1, 0).min() // size
    last = jnp.minimum(at.max(), slots - 1) // size
    queries = softmax.grouped(q)

    def step(index: Array, running: softmax.Running) -> softmax.Running:
        start = jnp.minimum(index * size, slots - size)  # the last block may reach back into the one before it
        slot = start + jnp.arange(size, dtype=jnp.int32)
        visible = visibility(at, slot[None], window) & (slot >= index * size)

        def block(stack: Array) -> Array:
            _, b, _, k, h = stack.shape
            return jax.lax.dynamic_slice(stack, (layer, 0, start, 0, 0), (1, b, size, k, h))[0]

        return softmax.fold(running, queries, block(keys), block(values), visible, spec)

    return softmax.finish(jax.lax.fori_loop(first, last + 1, step, softmax.begin(queries)), q)
