"""Paged attention against dense attention in numpy: shuffled pages, rows of all lengths, windows, caps, padding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jora.kernels import paged_attention as kernel
from jora.kernels import running_softmax
from jora.kernels.paged_attention import Table, paged_attention, write_pages
from jora.kernels.spec import AttentionSpec

KV, GROUP, WIDTH = 2, 3, 4
LAYERS, SLOT = 3, 1  # layers of a page, and ours
FULL = np.iinfo(np.int32).max


def dense(q, k, v, positions, window: int, spec: AttentionSpec) -> np.ndarray:
    """q [s, k, g, h] over keys [t, k, h] in float64, one query at a time."""
    out = np.zeros(q.shape)
    for s, position in enumerate(positions):
        if position < 0:
            continue
        seen = np.arange(max(0, position - window + 1), position + 1)
        scores = np.einsum("kgh,tkh->kgt", q[s].astype(np.float64), k[seen]) * spec.scale
        scores = scores if spec.cap is None else spec.cap * np.tanh(scores / spec.cap)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[s] = np.einsum("kgt,tkh->kgh", weights / weights.sum(-1, keepdims=True), v[seen])
    return out


@partial(jax.jit, static_argnums=(5, 6))
def attend(q, pool, pages, positions, window, page_tokens: int, spec: AttentionSpec):
    return paged_attention(q, pool, Table(pages, jnp.int32(SLOT), page_tokens), positions, window, spec)


class Filled:
    """Rows of these lengths in shuffled pages; what no row wrote is NaN."""

    def __init__(self, lengths: list[int], page_tokens: int, dtype=jnp.float32):
        self.draw = np.random.default_rng(page_tokens)
        rows, longest = len(lengths), max(lengths)
        blocks = -(-longest // page_tokens)
        self.pages = self.draw.permutation(np.arange(1, blocks * rows + 1)).reshape(rows, blocks).astype(np.int32)
        self.page_tokens = page_tokens
        self.k, self.v = self.draw.normal(0, 1, (2, rows, longest, KV, WIDTH)).astype(np.float32)
        at = np.arange(longest) + np.zeros((rows, 1), int)
        at = np.where(at < np.array(lengths)[:, None], at, -1).astype(np.int32)
        pool = jnp.full((blocks * rows + 1, 1, LAYERS * 2 * page_tokens * KV * WIDTH), jnp.nan, dtype)

        @jax.jit
        def fill(pool, k, v, pages, at):
            return write_pages(pool, k, v, Table(pages, jnp.int32(SLOT), page_tokens), at)

        self.pool = fill(pool, self.k, self.v, self.pages, at)

    def queries(self, positions: np.ndarray) -> np.ndarray:
        return self.draw.normal(0, 1, (*positions.shape, KV, GROUP, WIDTH)).astype(np.float32)

    def attend(self, q, positions: np.ndarray, window: int, spec: AttentionSpec, pages: np.ndarray | None = None):
        pages = self.pages if pages is None else pages
        arrays = (q, self.pool, pages, positions.astype(np.int32), np.int32(window))
        return np.asarray(attend(*arrays, self.page_tokens, spec))

    def expected(self, q, positions: np.ndarray, window: int, spec: AttentionSpec) -> np.ndarray:
        return np.stack([dense(*row, window, spec) for row in zip(q, self.k, self.v, positions, strict=True)])


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("page_tokens", [1, 5, 16])
def test_decode_equals_dense_attention(monkeypatch, page_tokens: int, cap: float | None) -> None:
    """Rows of very different lengths, one of them empty; several rounds of blocks."""
    monkeypatch.setattr(kernel, "CPU_BLOCK", 16)
    filled = Filled([83, 1, 20, 1, 64, 17], page_tokens)
    positions = np.array([82, 0, 19, -1, 63, 16])[:, None]
    q, spec = filled.queries(positions), AttentionSpec(0.6, cap=cap)
    for window in (FULL, 1, 7, 40):
        found = filled.attend(q, positions, window, spec)
        np.testing.assert_allclose(found, filled.expected(q, positions, window, spec), atol=2e-6)
        assert not found[3].any()


@pytest.mark.parametrize(("page_tokens", "window"), [(5, FULL), (16, 7), (3, 40)])
def test_a_chunk_is_causal_within_itself(monkeypatch, page_tokens: int, window: int) -> None:
    monkeypatch.setattr(kernel, "CPU_BLOCK", 16)
    filled = Filled([70], page_tokens)
    positions = np.concatenate([np.arange(41, 70), np.full(6, -1)])[None]
    q, spec = filled.queries(positions), AttentionSpec(0.6, cap=3.0)
    found = filled.attend(q, positions, window, spec)
    np.testing.assert_allclose(found, filled.expected(q, positions, window, spec), atol=2e-6)
    assert not found[0, -6:].any()


def test_pages_before_the_window_are_not_read() -> None:
    """Their numbers may be 0 (returned), and page 0 holds anything."""
    window, page_tokens = 9, 4
    filled = Filled([50, 23], page_tokens)
    positions = np.array([[49], [22]])
    q, spec = filled.queries(positions), AttentionSpec(1.0)
    pages = filled.pages.copy()
    for row, position in enumerate((49, 22)):
        pages[row, : (position - window + 1) // page_tokens] = 0
    found = filled.attend(q, positions, window, spec, pages)
    np.testing.assert_allclose(found, filled.expected(q, positions, window, spec), atol=2e-6)


def rounds(monkeypatch, positions: np.ndarray, window: int) -> int:
    """How many blocks of keys are folded in."""
    count = 0
    fold = running_softmax.fold

    def counted(*args):
        nonlocal count
        count += 1
        return fold(*args)

    filled = Filled([100] * len(positions), 4)
    monkeypatch.setattr(kernel, "CPU_BLOCK", 8)
    monkeypatch.setattr(running_softmax, "fold", counted)
    table = Table(jnp.asarray(filled.pages), jnp.int32(SLOT), 4)
    with jax.disable_jit():
        paged_attention(
            jnp.asarray(filled.queries(positions)),
            filled.pool,
            table,
            jnp.asarray(positions),
            jnp.int32(window),
            AttentionSpec(1.0),
        )
    return count


def test_cost_follows_lengths_and_windows(monkeypatch) -> None:
    with monkeypatch.context() as patch:
        assert rounds(patch, np.array([[99], [3]]), FULL) == 13  # 100 keys, 8 a round
    with monkeypatch.context() as patch:
        assert rounds(patch, np.array([[30], [3]]), FULL) == 4
    with monkeypatch.context() as patch:  # each row begins at its own window
        assert rounds(patch, np.array([[98], [3]]), 8) == 2
    with monkeypatch.context() as patch:
        assert rounds(patch, np.array([[-1], [-1]]), FULL) == 0
    with monkeypatch.context() as patch:  # padding asks for no more blocks
        assert rounds(patch, np.array([[40, 41, -1, -1]]), 8) == 2


def test_writing_touches_the_rows_own_tokens_alone() -> None:
    filled = Filled([6, 6], 4)
    positions = np.array([[4, 5], [-1, 5]], np.int32)
    k, v = np.ones((2, 2, 2, KV, WIDTH), np.float32) * np.array([100, 200])[:, None, None, None, None]
    table = Table(jnp.asarray(filled.pages), jnp.int32(SLOT), 4)
    before, after = (
        np.asarray(pool).reshape(-1, LAYERS, 2, 4, KV, WIDTH)
        for pool in (filled.pool, write_pages(filled.pool, k, v, table, jnp.asarray(positions)))
    )
    changed = np.argwhere((after != before) & ~(np.isnan(after) & np.isnan(before)))
    touched = {tuple(place[:4].tolist()) for place in changed}
    pages = filled.pages[:, 1].tolist()
    tokens = [(pages[0], 0), (pages[0], 1), (pages[1], 1), (0, 0)]  # padding goes to page 0
    assert touched == {(page, SLOT, which, offset) for page, offset in tokens for which in (0, 1)}
    assert (after[pages[1], SLOT, :, 1].reshape(2, -1) == [[100], [200]]).all()


def test_half_precision_sums_in_fp32() -> None:
    filled = Filled([200, 90], 16, jnp.bfloat16)
    positions = np.array([[199], [89]])
    q, spec = filled.queries(positions), AttentionSpec(0.6)
    rounded = jnp.asarray(q, jnp.bfloat16)
    found = filled.attend(rounded, positions, FULL, spec)
    assert found.dtype == jnp.bfloat16
    for name in ("k", "v"):
        setattr(filled, name, np.asarray(jnp.asarray(getattr(filled, name), jnp.bfloat16), np.float32))
    expected = filled.expected(np.asarray(rounded, np.float32), positions, FULL, spec)
    np.testing.assert_allclose(found.astype(np.float32), expected, atol=5e-3)
