"""What is drawn by hashing is the same on a GPU and on a CPU, bit for bit: adapters are moved between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.gpu.devices import cpu, gpu, on_both
from tests.methods.test_dropout import mask_of
from tests.methods.test_nola import random_nola

from jora.kernels import random_basis
from jora.kernels.counter_hash import fold_all, keep_mask
from jora.kernels.random_basis import basis_keys, linear_combination
from jora.methods.nola import NOLA
from jora.models.families import config_from_hf
from jora.models.model import Model
from jora.sharding import single_device

pytestmark = pytest.mark.gpu

NUMBERS = np.array([0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
# Element numbers of a factor, those at the end of their range among them.
ELEMENTS = np.concatenate([np.arange(500), 2**32 - 1 - np.arange(100)]).astype(np.uint32).reshape(20, 30)
BASES = 40


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_the_hash_of_a_counter() -> None:
    found, expected = on_both(lambda seed, values: fold_all(seed[:, None], values, 7), NUMBERS, NUMBERS)
    assert found.dtype == np.uint32 and len(np.unique(found)) == NUMBERS.size**2
    assert_same_bits(found, expected)


@pytest.mark.parametrize("draw", [random_basis.basis, random_basis.uniform])
def test_the_random_basis(draw: Callable[..., jax.Array]) -> None:
    keys = np.asarray(basis_keys(7, BASES, 1, 3))
    found, expected = on_both(draw, keys, ELEMENTS)
    assert found.dtype == np.float32 and found.shape == (BASES, 20, 30)
    assert_same_bits(found, expected)
    # A device that holds a slice of a factor draws that slice.
    part, part_on_cpu = on_both(draw, keys[3:5].copy(), ELEMENTS[2:9, 7:11].copy())
    assert_same_bits(part, part_on_cpu)
    assert_same_bits(part, expected[3:5, 2:9, 7:11].copy())


def test_keys_of_bases() -> None:
    found, expected = on_both(lambda seed: basis_keys(seed, BASES, 2, np.uint32(2**32 - 1)), np.uint32(2**31))
    assert_same_bits(found, expected)


def test_sums_over_bases_and_their_gradient() -> None:
    """Products are not rounded to TF32, whatever the default is: in training this is as near as fp32 sums are."""
    rng = np.random.default_rng(0)
    coefficients = rng.standard_normal((5, BASES)).astype(np.float32)
    weights = rng.standard_normal((3, 5, 64)).astype(np.float32)

    def run(c: jax.Array, keys: jax.Array, units: jax.Array, gradient: jax.Array) -> jax.Array:
        out, pull = jax.vjp(lambda c: linear_combination(c, keys, units, 3, 1000), c)
        return jnp.concatenate([out.ravel(), pull(gradient)[0].ravel()])

    with jax.default_matmul_precision("default"):
        keys = np.asarray(basis_keys(7, BASES, 0))
        found, expected = on_both(run, coefficients, keys, np.arange(64, dtype=np.int32), weights)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_factors_that_nola_expands_to() -> None:
    """Summed without rounding on the host, from bases that the device draws."""
    config = config_from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
        }
    )
    method = NOLA(rank=3, bases=BASES, targets=["q_proj", "down_proj"])

    def factors(device: jax.Device) -> Any:
        model = Model(None, config, single_device(device), {}, "", {})  # type: ignore[arg-type]
        with jax.default_device(device):
            return method.to_lora(random_nola(model, method)).state.trained

    ours, theirs = factors(gpu()), factors(cpu())
    assert {leaf.devices() == {gpu()} for leaf in jax.tree.leaves(ours)} == {True}
    for found, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.any(np.asarray(found))
        assert_same_bits(np.asarray(found), np.asarray(expected))


def test_dropout_masks() -> None:
    seeds = np.asarray(fold_all(7, 3, np.arange(6)))
    found, expected = on_both(lambda seeds: keep_mask(seeds, (6, 40, 3, 8), 0.3), seeds)
    assert 0.6 < found.mean() < 0.8
    np.testing.assert_array_equal(found, expected)
    masks = []
    for device in (gpu(), cpu()):
        with jax.default_device(device):
            masks.append(mask_of("down_proj", 1, step=5, rows=(3, 9)) > 0)  # as LoRA applies it
    np.testing.assert_array_equal(masks[0], masks[1])
