"""x A B and its gradients equal numpy's, whatever the shapes of either side; 16-bit activations train too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jora.kernels.low_rank import low_rank
from jora.sharding import single_device

SHAPES = [((6,), (2, 3, 4)), ((2, 3, 4), (6,)), ((5,), (7,))]


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_values_and_gradients_equal_numpy(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(2, 9, *inputs)), rng.normal(size=(*inputs, 3))
    b, gradient = rng.normal(size=(3, *outputs)), rng.normal(size=(2, 9, *outputs))
    product, pull = jax.vjp(
        lambda x, a, b: low_rank(x, a, b, single_device()), *(jnp.asarray(v, jnp.float32) for v in (x, a, b))
    )
    d_x, d_a, d_b = pull(jnp.asarray(gradient, jnp.float32))
    flat_x, flat_a, flat_b = x.reshape(18, -1), a.reshape(-1, 3), b.reshape(3, -1)
    flat_g = gradient.reshape(18, -1)
    np.testing.assert_allclose(np.ravel(product), np.ravel(flat_x @ flat_a @ flat_b), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.ravel(d_x), np.ravel(flat_g @ flat_b.T @ flat_a.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.ravel(d_a), np.ravel(flat_x.T @ flat_g @ flat_b.T), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.ravel(d_b), np.ravel((flat_x @ flat_a).T @ flat_g), rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_with_float32_factors() -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 9, 6)), jnp.bfloat16)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 3), (3, 5)))

    def loss(x, a, b):
        return low_rank(x, a, b, single_device()).astype(jnp.float32).sum()

    d_x, d_a, d_b = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, a, b)
    assert (d_x.dtype, d_a.dtype, d_b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    inner = np.asarray(x, np.float32)[0] @ np.asarray(a)
    np.testing.assert_allclose(d_b, np.tile(inner.sum(0)[:, None], 5), rtol=0.05, atol=0.05)
