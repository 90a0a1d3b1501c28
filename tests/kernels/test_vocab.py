"""The blocked product with a vocabulary's table equals the plain one, values and gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jora.kernels import vocab
from jora.sharding import single_device


@pytest.mark.parametrize("words", [16, 24, 27])
def test_gradients_equal_numpy(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    monkeypatch.setattr(vocab, "BLOCK", 8)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 3, 5)).astype(np.float32)
    table = rng.normal(size=(words, 5)).astype(np.float32)
    gradient = rng.normal(size=(2, 3, words)).astype(np.float32)
    product, pull = jax.vjp(lambda h, t: vocab.vocab_product(h, t, single_device()), hidden, table)
    d_hidden, d_table = pull(gradient)
    np.testing.assert_allclose(product, hidden @ table.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_hidden, gradient @ table, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_table, np.einsum("bnv,bnd->vd", gradient, hidden), rtol=1e-5, atol=1e-5)


def test_the_blocks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocab, "BLOCK", 8)
    loss = jax.grad(lambda h, t: vocab.vocab_product(h, t, single_device()).sum())
    text = str(jax.make_jaxpr(loss)(np.ones((1, 2, 5), np.float32), np.ones((16, 5), np.float32)))
    assert ("scan" in text) == (jax.default_backend() == "cpu")
