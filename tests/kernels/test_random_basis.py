"""Random bases: the published hash, the same bits however they are cut, and sums over them with their gradient."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.kernels.test_counter_hash import murmur

from jora.kernels import random_basis
from jora.kernels.random_basis import basis_keys, linear_combination
from jora.sharding import parse_mesh
from jora.sharding.mesh import build_layout

basis, uniform = jax.jit(random_basis.basis), jax.jit(random_basis.uniform)
MASK = 2**32 - 1

# Made with Python's integers, from the definition.
GOLDEN_KEYS = [698616249, 4119893205, 1555431482]
GOLDEN_ODD = [[-87, -119, -97, -139, 113, -223], [-179, 69, 125, 193, 43, 255], [1, -223, -45, 223, 181, 155]]
GOLDEN_UNIFORM = [9968295, 14353341, 8113893, -8162387]


def combine(seed: int, value: int) -> int:
    """`counter_hash.combine` in Python integers."""
    return murmur(seed ^ murmur((value * 0x9E3779B9 + 0x7F4A7C15) & MASK))


def odd(seed: int, stream: tuple[int, ...], basis: int, element: int) -> int:
    """One element of one basis times 256, from the definition."""
    for value in stream:
        seed = combine(seed, value)
    return 2 * (murmur((element * 0x9E3779B9 & MASK) ^ combine(seed, basis)) >> 24) - 255


def numpy_basis(seed: int, stream: tuple[int, ...], bases: int, elements: np.ndarray) -> np.ndarray:
    """float64 [k, *n]."""
    found = [[odd(seed, stream, i, int(e)) for e in elements.ravel()] for i in range(bases)]
    return np.array(found, float).reshape(bases, *elements.shape) / 256


def test_golden_values() -> None:
    """Written out: a change of any of them is another version of the hash, and old adapters are lost."""
    assert np.asarray(basis_keys(7, 3, 0)).tolist() == GOLDEN_KEYS
    keys = basis_keys(jnp.uint32(7), 3, 1, np.uint32(2**32 - 1), 3)
    drawn = np.asarray(basis(keys, jnp.array([0, 1, 2, 1000, 2**31, 2**32 - 1], jnp.uint32)))
    assert (drawn * 256).tolist() == GOLDEN_ODD
    assert (np.asarray(uniform(jnp.array([5], jnp.uint32), jnp.arange(4))) * 2**24).tolist() == [GOLDEN_UNIFORM]


def test_the_definition() -> None:
    elements = np.array([[0, 5], [70_000, 4_000_000_000]], np.uint32)
    found = np.asarray(basis(basis_keys(3, 6, 1, 9), jnp.asarray(elements)))
    np.testing.assert_array_equal(found, numpy_basis(3, (1, 9), 6, elements))
    # Exact in 16 bits already: an accelerator's products may take them so.
    np.testing.assert_array_equal(np.asarray(jnp.asarray(found).astype(jnp.bfloat16), np.float32), found)


def test_the_same_bits_however_they_are_cut(cpu_devices: list[jax.Device]) -> None:
    keys = basis_keys(1, 40, 0)
    elements = jnp.arange(96, dtype=jnp.uint32).reshape(4, 24)
    whole = np.asarray(basis(keys, elements))
    np.testing.assert_array_equal(np.asarray(random_basis.basis(keys, elements)), whole)
    np.testing.assert_array_equal(np.asarray(basis(keys[3:5], elements[1:3, 7:11])), whole[3:5, 1:3, 7:11])
    # Fewer bases are the first of more.
    np.testing.assert_array_equal(np.asarray(basis(basis_keys(1, 10, 0), elements)), whole[:10])
    layout = build_layout(parse_mesh("tensor=4"), 4)
    on_mesh = jax.device_put(elements, layout.sharding(("kv_heads", None), elements.shape))
    cut = layout.sharding((None, "kv_heads", None), whole.shape)
    drawn = jax.jit(random_basis.basis, out_shardings=cut)(keys, on_mesh)
    assert drawn.addressable_shards[0].data.shape == (40, 1, 24)
    np.testing.assert_array_equal(np.asarray(drawn), whole)


def test_statistics() -> None:
    """Mean, variance, and correlations between bases, streams and neighbouring elements."""
    count, bases = 1 << 14, 64
    elements = jnp.arange(count, dtype=jnp.uint32)
    values = np.asarray(basis(basis_keys(11, bases, 0), elements), np.float64)
    other = np.asarray(basis(basis_keys(11, bases, 1), elements), np.float64)
    assert abs(values.mean()) < 5 / np.sqrt(3 * values.size)
    assert values.var() == pytest.approx((1 - 2.0**-16) / 3, rel=0.005)
    histogram = np.bincount(((values * 256 + 255) / 2).astype(int).ravel(), minlength=256)
    assert ((histogram - values.size / 256) ** 2).sum() / (values.size / 256) < 256 + 5 * np.sqrt(512)
    unit = np.sqrt(3 / count)
    pairs = (values * unit) @ (values * unit).T * np.sqrt(count)
    above = pairs[np.triu_indices(bases, 1)]
    assert np.abs(above).max() < 5.5  # standard deviations, of 2,016 pairs
    assert above.std() == pytest.approx(1, rel=0.1)
    streams = (values * unit) @ (other * unit).T * np.sqrt(count)
    assert np.abs(streams).max() < 5.5
    for step in (1, 2, 16, 640, 2048):
        shifted = (values[:, step:] * values[:, :-step]).mean(axis=1) * 3 * np.sqrt(count - step)
        assert np.abs(shifted).max() < 5
    a0 = np.asarray(uniform(basis_keys(11, bases, 2), elements), np.float64)
    assert abs(a0.mean()) < 5 / np.sqrt(3 * a0.size)
    assert a0.var() == pytest.approx(1 / 3, rel=0.005)
    assert np.abs(np.corrcoef(a0) - np.eye(bases)).max() * np.sqrt(count) < 5.5


RANK, BASES = 3, 11
UNITS = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
ELEMENTS = UNITS[None] * RANK + np.arange(RANK).reshape(RANK, 1, 1, 1)


@pytest.mark.parametrize("chunk", [1, 130, 1 << 20])  # 11, 3 and 1 parts
def test_sum_and_gradient_against_the_explicit_basis(chunk: int) -> None:
    draw = np.random.default_rng(0)
    coefficients = draw.standard_normal((5, BASES)).astype(np.float32)
    explicit = numpy_basis(7, (0,), BASES, ELEMENTS)
    keys = basis_keys(7, BASES, 0)
    weights = draw.standard_normal((RANK, 5, *UNITS.shape)).astype(np.float32)

    @jax.jit
    def run(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, back = jax.vjp(lambda c: linear_combination(c, keys, jnp.asarray(UNITS), RANK, chunk), c)
        return out, back(jnp.asarray(weights))[0]

    out, gradient = run(jnp.asarray(coefficients))
    np.testing.assert_allclose(out, np.einsum("mk,kr...->rm...", coefficients, explicit), rtol=0, atol=3e-6)
    # da_i = <dL/dA, A_i>
    np.testing.assert_allclose(gradient, np.einsum("rmabc,krabc->mk", weights, explicit), rtol=0, atol=3e-6)


def test_a_chunk_of_the_basis_is_all_that_exists() -> None:
    """By the compiler's own count, for a factor whose basis is 134 MB."""
    units, rank, chunk = 4096, 16, 1 << 18

    def both(c: jax.Array, keys: jax.Array, units: jax.Array) -> jax.Array:
        return jax.grad(lambda c: jnp.sum(linear_combination(c, keys, units, rank, chunk) ** 2))(c)

    shapes = ((2, 512), jnp.float32), ((512,), jnp.uint32), ((units,), jnp.int32)
    compiled = jax.jit(both).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    factor = 4 * 2 * units * rank
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * chunk + 4 * factor


def test_enough_bases_span_every_factor() -> None:
    """k >= m r: a least-squares fit of any target has no residual; with fewer it has."""
    elements = jnp.arange(24, dtype=jnp.uint32)
    target = np.random.default_rng(0).standard_normal(24)
    spanned = partial(np.linalg.lstsq, rcond=None)
    enough = np.asarray(basis(basis_keys(0, 24, 0), elements), np.float64).T
    few = np.asarray(basis(basis_keys(0, 20, 0), elements), np.float64).T
    assert np.linalg.norm(enough @ spanned(enough, target)[0] - target) < 1e-10
    assert np.linalg.norm(few @ spanned(few, target)[0] - target) > 0.1
