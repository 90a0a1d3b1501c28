"""One token's attention over pages on an NVIDIA GPU: every key and value is read once, where it lies.

Plain XLA (`paged_attention`) gathers a block of pages into a new array and reads that, so it moves each byte at least
three times. Here a program of the grid takes one row, one KV head and one part of the row's visible tokens, reads
`TOKENS` of them at a time through the page table, and keeps a running softmax of the head's queries (arXiv
1805.02867); the parts of a row are put together afterwards, so few long rows fill the device too.

Pallas' Triton backend: jax deprecates it in favour of Mosaic GPU (from 0.11), and the versions that Jora allows have
it. The XLA code stays the truth that this is tested against, and takes over wherever `why_not` says so.

Shape legend: b rows, k KV heads, g query heads per KV head, q those padded for the matrix units, h head width, P
tokens of a page, t tokens read at a time, n parts of a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jora.kernels import running_softmax as softmax
from jora.kernels.spec import AttentionSpec

TOKENS = 64
QUERIES = 16  # the fewest rows that the matrix units multiply
PROGRAMS = 528  # four for each multiprocessor of a large GPU; with fewer rows and heads, rows are cut into parts
PARTS = 16


def why_not(dtype: Any, new_tokens: int, heads: tuple[int, ...]) -> str | None:
    """The reason why this kernel cannot run here, or None where it does. heads: (query heads per KV head, width)."""
    per_kv_head, width = heads
    if jax.default_backend() != "gpu":
        return f"the device is a {jax.default_backend()}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it reads 16-bit floats only, not {jnp.dtype(dtype).name}"
    if new_tokens != 1:
        return "it is for one new token a row"
    if width & (width - 1) or not 16 <= width <= 256:
        return f"it takes head widths that are powers of 2 from 16 to 256, not {width}"
    if per_kv_head > QUERIES:
        return f"it takes at most {QUERIES} query heads per KV head, not {per_kv_head}"
    return None


def decode_pages(
    q: Float[Array, "b 1 k g h"],
    pool: Float[Array, "pages 1 elements"],
    pages: Int[Array, "b blocks"],
    slot: Int[Array, ""],
    page_tokens: int,
    positions: Int[Array, "b 1"],
    window: Int[Array, ""],
    spec: AttentionSpec,
    *,
    interpret: bool = False,
) -> Float[Array, "b 1 k g h"]:
    """What `paged_attention` gives, for one new token a row. interpret: run the kernel in plain jax, to test it."""
    b, _, k, g, h = q.shape
    queries = jnp.pad(q[:, 0], ((0, 0), (0, 0), (0, QUERIES - g), (0, 0))).astype(pool.dtype)
    parts = min(PARTS, max(1, -(-PROGRAMS // (b * k))))
    where = jnp.stack([slot, window]).astype(jnp.int32)
    part = (parts, b, k, QUERIES)
    kernel = partial(_part, page_tokens=page_tokens, parts=parts, width=h, kv_heads=k, spec=spec)
    found = pl.pallas_call(
        kernel,
        grid=(b, k, parts),
        in_specs=[
            pl.BlockSpec(where.shape, lambda i, j, n: (0,)),
            pl.BlockSpec((None, 1), lambda i, j, n: (i, 0)),
            pl.BlockSpec((None, pages.shape[1]), lambda i, j, n: (i, 0)),
            pl.BlockSpec((None, None, QUERIES, h), lambda i, j, n: (i, j, 0, 0)),
            pl.BlockSpec(pool.shape, lambda i, j, n: (0, 0, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, QUERIES), lambda i, j, n: (n, i, j, 0)),
            pl.BlockSpec((None, None, None, QUERIES), lambda i, j, n: (n, i, j, 0)),
            pl.BlockSpec((None, None, None, QUERIES, h), lambda i, j, n: (n, i, j, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(part, jnp.float32),
            jax.ShapeDtypeStruct(part, jnp.float32),
            jax.ShapeDtypeStruct((*part, h), jnp.float32),
        ],
        compiler_params=None if interpret else _triton_options(),
        interpret=interpret,
        name="paged_decode",
    )(where, positions, pages, queries, pool)
    whole = _together(softmax.Running(*found))
    return softmax.finish(softmax.Running(*(x[:, :, :g] for x in whole)), q)


def _triton_options() -> Any:
    from jax.experimental.pallas import triton  # not importable everywhere, and needed on a GPU alone

    return triton.CompilerParams(num_warps=4, num_stages=3)


def _part(
    where: Any,
    position: Any,
    pages: Any,
    queries: Any,
    pool: Any,
    largest_out: Any,
    total_out: Any,
    values_out: Any,
    *,
    page_tokens: int,
    parts: int,
    width: int,
    kv_heads: int,
    spec: AttentionSpec,
) -> None:
    """One part of what one row's queries of one KV head see: a `Running` softmax."""
    from jax.experimental.pallas import triton

    head, part = pl.program_id(1), pl.program_id(2)
    slot, window, last = where[0], where[1], position[0]
    first = jnp.maximum(last - window + 1, 0)
    each = pl.cdiv(pl.cdiv(last + 1 - first, parts), TOKENS) * TOKENS
    begin = first + part * each
    end = jnp.minimum(begin + each, last + 1)
    q = queries[...]
    column = head * width + jnp.arange(width, dtype=jnp.int32)
    token_size = kv_heads * width

    def read(page: Array, row: Array, visible: Array) -> Array:
        shape = (TOKENS, width)
        at = [jnp.broadcast_to(x, shape) for x in (page[:, None], row[:, None] * token_size + column[None])]
        mask = jnp.broadcast_to(visible[:, None], shape)
        return triton.load(pool.at[at[0], jnp.zeros(shape, jnp.int32), at[1]], mask=mask, other=0)

    def fold(step: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, values = running
        token = begin + step * TOKENS + jnp.arange(TOKENS, dtype=jnp.int32)
        visible = token < end
        block, offset = jax.lax.div(token, jnp.int32(page_tokens)), jax.lax.rem(token, jnp.int32(page_tokens))
        page = triton.load(pages.at[block], mask=visible, other=0)
        key_row = slot * 2 * page_tokens + offset
        scores = _product(q, read(page, key_row, visible).T) * spec.scale
        if spec.cap is not None:
            scores = spec.cap * jnp.tanh(scores / spec.cap)
        scores = jnp.where(visible[None], scores, softmax.MASKED)
        now = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp(scores - now[:, None])  # the first token of a round is visible, so `now` is a real score
        shrink = jnp.exp(largest - now)
        value_rows = read(page, key_row + page_tokens, visible)
        added = _product(weights.astype(value_rows.dtype), value_rows)
        return now, total * shrink + weights.sum(axis=1), values * shrink[:, None] + added

    empty = jnp.zeros(QUERIES, jnp.float32)
    start = (empty + softmax.MASKED, empty, jnp.zeros((QUERIES, width), jnp.float32))
    rounds = jnp.maximum(pl.cdiv(end - begin, TOKENS), 0)
    largest_out[...], total_out[...], values_out[...] = jax.lax.fori_loop(0, rounds, fold, start)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _together(parts: softmax.Running) -> softmax.Running:
    """The softmax over all parts of each row."""
    largest = parts.largest.max(axis=0)
    share = jnp.exp(parts.largest - largest)
    return softmax.Running(largest, (parts.total * share).sum(axis=0), (parts.values * share[..., None]).sum(axis=0))
