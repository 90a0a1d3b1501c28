"""8-bit numbers against bitsandbytes, and Adam's moments in 8 bit against its published arithmetic."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jora.optim import scale_by_adam
from jora.optim.adam import AdamState
from jora.optim.blockwise import BLOCK, Quantised, code_book, dequantise, quantise


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers whose size differs by orders of magnitude between blocks; a block of zeros."""
    source = np.random.default_rng(seed)
    x = source.normal(size=shape) * np.exp(3 * source.normal(size=(*shape[:-1], 1)))
    x[0] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_is_bitsandbytes(signed: bool) -> None:
    np.testing.assert_allclose(code_book(signed), bnb.create_dynamic_map(signed).numpy(), rtol=1e-6, atol=0)


def nearest(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values after rounding, largest magnitudes) by bitsandbytes' definition: the nearest entry of its table."""
    book = bnb.create_dynamic_map(signed).numpy()
    flat = np.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(flat).max(1, keepdims=True)
    scaled = flat / np.where(absmax > 0, absmax, 1)
    codes = np.abs(scaled[..., None] - book).argmin(-1)
    return (book[codes] * absmax).reshape(-1)[: x.size].reshape(x.shape), absmax[:, 0]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(40, 512), (33, 100)])  # the second ends in a block of 228
def test_codes_equal_bitsandbytes(signed: bool, shape: tuple[int, int]) -> None:
    x = draw(*shape) if signed else np.abs(draw(*shape))
    ours = quantise(jnp.asarray(x), signed=signed)
    back = np.asarray(dequantise(ours, signed=signed))
    expected, absmax = nearest(x, signed)
    np.testing.assert_array_equal(ours.absmax, absmax)
    assert np.isclose(back, expected, rtol=1e-6).mean() > 0.9998  # the rest are ties
    np.testing.assert_allclose(np.abs(back - x), np.abs(expected - x), atol=1e-5 * np.abs(x).max())
    # bitsandbytes itself finds the code on a CPU by a table of intervals: near two codes' middle it is one off.
    theirs, state = bnb.quantize_blockwise(torch.from_numpy(x), bnb.create_dynamic_map(signed), blocksize=BLOCK)
    off = np.abs(np.asarray(ours.codes).astype(int) - theirs.numpy().astype(int))[x != 0]
    assert (off == 0).mean() > 0.9
    values = bnb.dequantize_blockwise(theirs, state).numpy()
    assert (np.abs(back - x) <= np.abs(values - x) + 1e-6 * np.abs(x)).all()


def test_blocks_do_not_cross_kept_axes() -> None:
    x = draw(3, 4, 300)
    whole = quantise(jnp.asarray(x), signed=True, keep=2)
    assert whole.absmax.shape == (3, 4, 2)
    for i in range(3):
        row = quantise(jnp.asarray(x[i]), signed=True, keep=1)
        np.testing.assert_array_equal(whole.codes[i], row.codes)
    np.testing.assert_array_equal(whole.absmax[..., 1], np.abs(x[..., 256:]).max(-1))


def numpy_adam8(gradients: list[np.ndarray], b1: float, b2: float, eps: float) -> np.ndarray:
    """The last direction of block-wise 8-bit Adam, by bitsandbytes' definition."""
    m, v = (np.zeros_like(gradients[0]) for _ in range(2))
    for step, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        direction = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        m, v = nearest(m, True)[0], nearest(v, False)[0]
    return direction


def test_adam_in_8_bit() -> None:
    gradients = [draw(16, 512, seed=s) for s in range(5)]
    adam = scale_by_adam(0.9, 0.99, 1e-8, moments="int8")
    params = {"large": jnp.zeros((16, 512)), "small": jnp.zeros((8, 511))}
    state = adam.init(params)
    assert isinstance(state.mu["large"], Quantised) and state.mu["large"].codes.dtype == jnp.uint8
    assert state.mu["small"].dtype == jnp.float32  # 4088 elements, fewer than 4096
    assert isinstance(state, AdamState)
    update = jax.jit(adam.update)
    for g in gradients:
        directions, state = update({"large": jnp.asarray(g), "small": jnp.asarray(g[:8, :511])}, state)
    expected = numpy_adam8(gradients, 0.9, 0.99, 1e-8)
    close = np.isclose(directions["large"], expected, rtol=1e-3, atol=1e-5)
    assert close.mean() > 0.999  # a code on an edge moves its element by a step of the table
    exact = torch.optim.Adam([p := torch.nn.Parameter(torch.zeros(8, 511))], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    for g in gradients:
        before = p.detach().clone()
        p.grad = torch.from_numpy(g[:8, :511].copy())
        exact.step()
    np.testing.assert_allclose(directions["small"], (before - p.detach()).numpy(), atol=2e-5)
