"""Attention over keys and values that lie in pages, and the writing of new ones: one device's part.

Decoding on a GPU has a kernel of its own (`paged_decode`), where that can run; this is plain XLA, its truth. A block of
keys (`BLOCK` tokens of every row, each from its own pages) is read at a time and folded into a running
softmax. The number of rounds is data: that of the row that sees most, from the first key in its window to its last.
Cost so follows true lengths, and no program is compiled for a length. Decoding (s = 1) and prompt chunks are the same
code; keys are written before they are read, so a chunk is causal within itself too.

The pool is read and written where it is, by offsets into its last axis. On a CPU (jax 0.10, 16 rows of 512 tokens,
Gemma 3 270M) a reshaped view of it would be a copy of all pages in every layer, 40 ms instead of 3; blocks of 64 and
128 tokens are equally fast, 512 take a third longer, and a loop over single rows takes twice as long.

Shape legend: b rows, s new tokens a row, k KV heads, g query heads per KV head, h head width, P tokens of a page,
t tokens of a block.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jora.kernels import paged_decode
from jora.kernels import running_softmax as softmax
from jora.kernels.attention_xla import visibility
from jora.kernels.spec import AttentionSpec

# Keys a round. A CPU works on what its caches hold; elsewhere a round is a launch of kernels, so few of them.
CPU_BLOCK, BLOCK = 128, 1024
_FAR = jnp.iinfo(jnp.int32).max

Pool = Float[Array, "pages 1 elements"]


class Table(NamedTuple):
    """Where one layer's keys and values are: page of each block of P tokens, and the layer's place in a page.

    A page holds `[G, 2, P, k, h]` in one row; slot is the index along G. Pages of blocks that no query sees may be 0.
    """

    pages: Int[Array, "b blocks"]
    slot: Int[Array, ""]
    page_tokens: int


def write_pages(
    pool: Pool, k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], table: Table, positions: Int[Array, "b s"]
) -> Pool:
    """Store new tokens' keys and values; what has position -1 (padding) goes to page 0, which is nobody's."""
    size = k.shape[2] * k.shape[3]
    block, offset = jnp.divmod(jnp.maximum(positions, 0), table.page_tokens)
    page = jnp.take_along_axis(table.pages, block, axis=1, mode="clip")
    page = jnp.where(positions >= 0, page, 0)
    key_at = (table.slot * 2 * table.page_tokens + offset) * size
    at = jnp.stack([key_at, key_at + table.page_tokens * size])
    new = jnp.stack([k, v]).astype(pool.dtype).reshape(2, *positions.shape, size)
    places = jnp.stack([jnp.broadcast_to(page, at.shape), at], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(3,), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 2)
    )
    return jax.lax.scatter(pool, places, new, numbers, mode="promise_in_bounds")


def paged_attention(
    q: Float[Array, "b s k g h"],
    pool: Pool,
    table: Table,
    positions: Int[Array, "b s"],
    window: Int[Array, ""],
    spec: AttentionSpec,
) -> Float[Array, "b s k g h"]:
    """What queries at `positions` see of their rows; like q. Position -1 (padding) gives zeros and costs nothing.

    window: the last keys that a query sees, itself included; data, as layers of every kind share one program
    (`spec.window` is not read).
    """
    if paged_decode.why_not(pool.dtype, q.shape[1], q.shape[3:]) is None:
        return paged_decode.decode_pages(q, pool, *table, positions, window, spec)
    block = CPU_BLOCK if jax.default_backend() == "cpu" else BLOCK
    per_block = max(1, block // table.page_tokens)
    valid = positions >= 0
    lowest = jnp.where(valid, jnp.maximum(positions - window + 1, 0), _FAR).min(axis=1)
    last = positions.max(axis=1)
    first_page = jnp.where(last >= 0, lowest, 0) // table.page_tokens
    pages = jnp.where(last >= 0, last // table.page_tokens + 1 - first_page, 0)
    rounds = (pages.max() + per_block - 1) // per_block
    queries = softmax.grouped(q)

    def step(index: Array, running: softmax.Running) -> softmax.Running:
        blocks = first_page[:, None] + index * per_block + jnp.arange(per_block, dtype=jnp.int32)
        keys, values = _read(pool, table, blocks, q.shape[2:])
        at = (blocks[:, :, None] * table.page_tokens + jnp.arange(table.page_tokens)).reshape(keys.shape[:2])
        # A page may hold anything where this row has not written, even NaN: a weight of 0 would not hide that.
        mine = (at >= lowest[:, None]) & (at <= last[:, None])
        values = jnp.where(mine[:, :, None, None], values, 0)
        return softmax.fold(running, queries, keys, values, visibility(positions, at, window), spec)

    return softmax.finish(jax.lax.fori_loop(0, rounds, step, softmax.begin(queries)), q)


def _read(
    pool: Pool, table: Table, blocks: Int[Array, "b n"], heads: tuple[int, ...]
) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Keys and values of some blocks of each row; of the last one again where there are no more."""
    k, _, h = heads
    size = table.page_tokens * k * h
    page = jnp.take_along_axis(table.pages, blocks, axis=1, mode="clip")
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(2,), collapsed_slice_dims=(0, 1), start_index_map=(0, 2))
    read = partial(jax.lax.gather, dimension_numbers=numbers, slice_sizes=(1, 1, size), mode="promise_in_bounds")

    def part(which: int) -> Array:
        at = jnp.broadcast_to((table.slot * 2 + which) * size, page.shape)
        return read(pool, jnp.stack([page, at], axis=-1)).reshape(page.shape[0], -1, k, h)

    return part(0), part(1)
