"""Blocked attention against plain masked attention in torch: values and gradients."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jora.kernels.attention import _cudnn, explain, self_attention, why_not_cudnn
from jora.kernels.attention_xla import blocked_attention
from jora.kernels.spec import AttentionSpec

KV, GROUP, WIDTH = 2, 2, 4


def plain(q, k, v, visible: np.ndarray, spec: AttentionSpec) -> torch.Tensor:
    """Softmax attention with every score at once; rows that see nothing give 0."""
    scores = torch.einsum("bskgh,btkh->bkgst", q, k) * spec.scale
    if spec.cap is not None:
        scores = spec.cap * torch.tanh(scores / spec.cap)
    mask = torch.tensor(visible)[:, None, None]
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num()
    return torch.einsum("bkgst,btkh->bskgh", weights, v)


def visible_pairs(length: int, segments: np.ndarray | None, window: int | None) -> np.ndarray:
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    visible = visible[None]
    return visible if segments is None else visible & (segments[:, :, None] == segments[:, None, :])


def inputs(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, ...]:
    shapes = (rows, length, KV, GROUP, WIDTH), (rows, length, KV, WIDTH), (rows, length, KV, WIDTH)
    return tuple(rng.normal(0, 1, shape).astype(np.float32) for shape in shapes)


def packed(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Random segments 1, 2, ... of random lengths, padding (0) at the end."""
    cuts = np.sort(rng.integers(0, length + 1, (rows, 3)), axis=1)
    index = np.arange(length)[None]
    segments = 1 + (index >= cuts[:, :1]) + (index >= cuts[:, 1:2])
    return np.where(index >= cuts[:, 2:], 0, segments).astype(np.int32)


# Lengths around one block of 8, several, the last that is unrolled (64) and bands of several blocks.
CASES = [
    (1, None, False, None),
    (7, 3, True, None),
    (8, None, True, 2.0),
    (9, 8, False, None),
    (40, 5, True, 2.0),
    (64, None, True, None),
    (65, None, False, None),
    (77, 20, True, None),
    (129, 3, False, 2.0),
    (131, None, True, None),
    (150, 70, True, None),
    (150, 1, False, None),
]


@pytest.mark.parametrize(("length", "window", "is_packed", "cap"), CASES)
def test_blocked_equals_plain(monkeypatch, length, window, is_packed, cap):
    monkeypatch.setattr("jora.kernels.attention_xla.BLOCK", 8)
    rng = np.random.default_rng(length)
    spec = AttentionSpec(scale=0.7, window=window, cap=cap)
    arrays = inputs(rng, 2, length)
    weights = rng.normal(0, 1, arrays[0].shape).astype(np.float32)
    segments = packed(rng, 2, length) if is_packed else None

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *qkv: blocked_attention(*qkv, segments, spec), q, k, v)
        return out, pull(jnp.asarray(weights))

    found, gradients = run(*arrays)
    q, k, v = (torch.tensor(a, requires_grad=True) for a in arrays)
    expected = plain(q, k, v, visible_pairs(length, segments, window), spec)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-6)
    for gradient, oracle in zip(gradients, (q, k, v), strict=True):
        np.testing.assert_allclose(gradient, oracle.grad.numpy(), atol=2e-5)


def test_a_padded_row_stays_finite_and_out_of_the_others():
    arrays = inputs(np.random.default_rng(0), 2, 9)
    segments = np.stack([np.zeros(9), np.ones(9)]).astype(np.int32)
    spec = AttentionSpec(scale=1.0)
    found = np.asarray(self_attention(*map(jnp.asarray, arrays), jnp.asarray(segments), spec))
    assert np.isfinite(found).all()
    alone = self_attention(*(jnp.asarray(a[1:]) for a in arrays), None, spec)
    np.testing.assert_allclose(found[1:], alone, atol=1e-6)


def test_a_window_layer_never_scores_all_keys(monkeypatch):
    monkeypatch.setattr("jora.kernels.attention_xla.BLOCK", 8)
    q, k, v = map(jnp.asarray, inputs(np.random.default_rng(0), 1, 200))

    def widest(window: int | None) -> int:
        run = jax.jit(lambda q, k, v: blocked_attention(q, k, v, None, AttentionSpec(1.0, window=window)))
        text = str(jax.make_jaxpr(run)(q, k, v))
        sizes = [int(n) for n in re.findall(r"f32\[1,2,2,8,(\d+)\]", text)]
        return max(sizes)

    assert widest(5) <= 5 + 8
    assert widest(None) == 200


@pytest.mark.parametrize("length", [8, 9])
def test_what_is_given_to_cudnn(monkeypatch, length):
    """Even lengths only, for their gradients; XLA stands in for the kernel, which has the same arguments."""
    given = []

    def stand_in(q, *arrays, implementation, **options):
        assert implementation == "cudnn"
        given.append(q.shape[1])
        return attend(q, *arrays, implementation="xla", **options)

    attend = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(0, 1, s), jnp.float32) for s in ((2, length, 2, 3, 4), *2 * [(2, length, 2, 4)]))
    spec = AttentionSpec(0.5, window=5)
    np.testing.assert_allclose(_cudnn(q, k, v, spec), blocked_attention(q, k, v, None, spec), atol=2e-6)
    assert given == [8 if length == 8 else 10]


def test_the_choice_of_kernel_is_explained():
    lines = explain()
    assert len(lines) == 7
    if jax.default_backend() == "cpu":
        assert why_not_cudnn(jnp.bfloat16, 128, AttentionSpec(1.0), False) == "the device is a cpu"
        assert all("the device is a cpu" in line for line in lines)
