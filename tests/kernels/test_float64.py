"""NOLA's and fLoRA's identities to float64's precision: the kernels' own code, with float64 where it says float32.

In fp32 they hold to some 1e-6 (tests/methods), which a small wrong term could hide in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jora.kernels import hadamard, random_basis, widen
from jora.kernels.hadamard import hadamard_product
from jora.kernels.random_basis import basis, basis_keys, linear_combination
from jora.sharding import single_device


class _Wide:
    """jax.numpy with a wider float32."""

    float32 = jnp.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (hadamard, random_basis, widen):
        monkeypatch.setattr(module, "jnp", _Wide())
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def assert_close(found: Any, expected: np.ndarray, tolerance: float) -> None:
    assert np.asarray(found).dtype == np.float64
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_gradients_of_nolas_coefficients() -> None:
    """da_i = <dL/dA, A_i>, and as much for b, with dL/dA of a dense LoRA of the same factors."""
    width, out, rank, bases = 12, 7, 3, 11
    keys = {side: basis_keys(5, bases, number) for number, side in enumerate("ab")}
    units = {"a": jnp.arange(width), "b": jnp.arange(out)}
    x, a0 = jnp.asarray(normal(6, width, seed=0)), jnp.asarray(normal(width, rank, seed=1))
    coefficients = {side: jnp.asarray(normal(1, bases, seed=number)) for number, side in enumerate("ab", 2)}

    def factors(coefficients: Any) -> tuple[Any, Any]:
        # A small chunk, so that sums go over several; [r, 1, units].
        a, b = (linear_combination(coefficients[s], keys[s], units[s], rank, 2 * units[s].size)[:, 0] for s in "ab")
        return a.T + a0, b

    def loss(a: Any, b: Any) -> Any:
        return jnp.sum(jnp.sin(x @ a @ b))

    found = jax.grad(lambda c: loss(*factors(c)))(coefficients)
    slopes = dict(zip("ab", jax.grad(loss, argnums=(0, 1))(*factors(coefficients)), strict=True))
    for side, n in (("a", width), ("b", out)):
        drawn = np.asarray(basis(keys[side], jnp.arange(n * rank))).reshape(bases, n, rank)
        slope = np.asarray(slopes[side] if side == "a" else slopes[side].T)
        assert_close(found[side][0], np.einsum("ur,kur->k", slope, drawn), 1e-10)


def test_each_row_of_flora_has_a_weight_of_its_own() -> None:
    """x_i (W * sum_j in_ij out_ij^T), its gradients as well."""
    x, w = normal(4, 5, 3, 4, seed=0), normal(3, 4, 6, seed=1)
    inputs, outputs = normal(4, 3, 3, 4, seed=2), normal(4, 3, 6, seed=3)

    def product(x: Any, inputs: Any, outputs: Any) -> Any:
        return hadamard_product(x, jnp.asarray(w), inputs, outputs, (None, None), (None,), single_device())

    found, pull = jax.vjp(product, *map(jnp.asarray, (x, inputs, outputs)))
    changed = w * np.einsum("bruv,bro->buvo", inputs, outputs)
    assert_close(found, np.einsum("bsuv,buvo->bso", x, changed), 1e-12)
    slope = normal(4, 5, 6, seed=4)
    d_x, d_inputs, d_outputs = pull(jnp.asarray(slope))
    d_changed = np.einsum("bsuv,bso->buvo", x, slope) * w
    assert_close(d_x, np.einsum("bso,buvo->bsuv", slope, changed), 1e-12)
    assert_close(d_inputs, np.einsum("buvo,bro->bruv", d_changed, outputs), 1e-12)
    assert_close(d_outputs, np.einsum("buvo,bruv->bro", d_changed, inputs), 1e-12)
