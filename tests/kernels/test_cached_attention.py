"""Attention over the contiguous cache against dense attention in numpy: rows of all lengths, windows, caps, blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.kernels.test_paged_attention import dense

from jora.kernels import cached_attention as kernel
from jora.kernels import running_softmax
from jora.kernels.cached_attention import cached_attention, write_slots
from jora.kernels.spec import AttentionSpec

LAYERS, LAYER, KV, GROUP, WIDTH = 3, 1, 2, 3, 4
FULL = np.iinfo(np.int32).max


class Filled:
    """Rows that hold `held` tokens each in `slots`; the other slots, and the other layers, hold garbage."""

    def __init__(self, held: list[int], slots: int) -> None:
        self.draw = np.random.default_rng(slots)
        self.k, self.v = self.draw.normal(0, 1, (2, len(held), slots, KV, WIDTH)).astype(np.float32)
        self.held, self.slots = np.array(held), slots

    def attend(self, new: int, window: int, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
        """(found, expected) where each row gets `new` more tokens."""
        rows, at = len(self.held), (self.held[:, None] + np.arange(new)).astype(np.int32)
        q = self.draw.normal(0, 1, (rows, new, KV, GROUP, WIDTH)).astype(np.float32)
        old = np.arange(self.slots) < self.held[:, None]
        stacks = [np.full((LAYERS, *x.shape), 1e4, np.float32) for x in (self.k, self.v)]
        for stack, x in zip(stacks, (self.k, self.v), strict=True):
            stack[LAYER] = np.where(old[..., None, None], x, 1e4)

        @jax.jit
        def run(keys, values, q, k, v, at, window):
            layer = jnp.int32(LAYER)
            keys, values = write_slots(keys, layer, k, at), write_slots(values, layer, v, at)
            return cached_attention(q, keys, values, layer, at, window, spec)

        fresh = (np.take_along_axis(x, at[..., None, None], axis=1) for x in (self.k, self.v))
        found = run(*stacks, q, *fresh, at, np.int32(window))
        expected = [dense(q[r], self.k[r], self.v[r], at[r], window, spec) for r in range(rows)]
        return np.asarray(found), np.stack(expected)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("slots", [8, 24, 67])  # one block, whole blocks, and a last block that reaches back
def test_new_tokens_see_what_their_row_holds(monkeypatch, slots: int, cap: float | None) -> None:
    monkeypatch.setattr(kernel, "CPU_BLOCK", 8)
    filled = Filled([slots - 3, 0, slots // 2], slots)
    for new in (1, 3):
        for window in (FULL, 1, 5, 20):
            found, expected = filled.attend(new, window, AttentionSpec(0.7, cap=cap))
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_token_past_the_last_slot_is_dropped() -> None:
    stack = jnp.zeros((LAYERS, 2, 4, 1, 1))
    at = np.array([[3, 4], [0, 1]], np.int32)
    written = np.asarray(write_slots(stack, jnp.int32(LAYER), jnp.ones((2, 2, 1, 1)), at))
    assert written[LAYER, :, :, 0, 0].tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]
    assert written.sum() == 3


def rounds(patch: pytest.MonkeyPatch, at: list[int], window: int, slots: int = 100) -> int:
    """How many blocks of 8 keys are folded in."""
    count = 0
    fold = running_softmax.fold

    def counted(*args):
        nonlocal count
        count += 1
        return fold(*args)

    patch.setattr(kernel, "CPU_BLOCK", 8)
    patch.setattr(running_softmax, "fold", counted)
    stack = jnp.zeros((1, len(at), slots, KV, WIDTH))
    q = jnp.zeros((len(at), 1, KV, GROUP, WIDTH))
    where = jnp.asarray(at, jnp.int32)[:, None]
    with jax.disable_jit():
        cached_attention(q, stack, stack, jnp.int32(0), where, jnp.int32(window), AttentionSpec(1.0))
    return count


@pytest.mark.parametrize(
    ("at", "window", "blocks"), [([99, 3], FULL, 13), ([30, 3], FULL, 4), ([99, 95], 8, 2), ([99, 99], 4, 1)]
)
def test_cost_follows_lengths_and_windows(monkeypatch, at: list[int], window: int, blocks: int) -> None:
    assert rounds(monkeypatch, at, window) == blocks
