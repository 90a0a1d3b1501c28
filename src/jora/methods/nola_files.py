"""NOLA's files: coefficients in 8 or 4 bits, and the expansion to LoRA factors that files everywhere agree on.

Stored in 8 or 4 bits, 64 coefficients of a vector share one fp32 scale, the largest magnitude over 127 or 7; a code
is the nearest multiple of the scale, so a coefficient is off by at most half a scale. 8-bit codes are int8; of two
4-bit codes in a byte the first is in the low half, each plus 8. Loading gives code * scale in fp32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, UInt8

from jora.errors import InputError
from jora.kernels.random_basis import CHUNK, LEVELS, basis, uniform
from jora.methods.factors import Factors, FactorSite, device_state
from jora.methods.lora import site_shape
from jora.methods.method import Adapter, State
from jora.methods.nola import NOLA, offset_keys, side_keys
from jora.methods.storage import AdapterFile, place
from jora.models.model import Model
from jora.models.safetensors_file import Entry
from jora.models.tensors import LinearShape
from jora.sharding import Layout, single_device

BLOCK = 64  # coefficients that share a scale
_LEVELS = {8: 127, 4: 7}


def quantise(
    coefficients: Float[np.ndarray, "n k"], bits: int
) -> tuple[Int8[np.ndarray, "n k"] | UInt8[np.ndarray, "n h"], Float[np.ndarray, "n blocks"]]:
    """Codes (4 bits: h = ceil(k / 2) bytes) and scales."""
    n, k = coefficients.shape
    blocks = np.pad(coefficients, ((0, 0), (0, -k % BLOCK))).reshape(n, -1, BLOCK)
    scales = np.abs(blocks).max(-1) / np.float32(_LEVELS[bits])
    codes = np.rint(blocks / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8).reshape(n, -1)[:, :k]
    if bits == 8:
        return codes, scales
    nibbles = (np.pad(codes, ((0, 0), (0, k % 2))) + 8).astype(np.uint8)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4, scales


def dequantise(
    codes: Int8[np.ndarray, "n k"] | UInt8[np.ndarray, "n h"], scales: Float[np.ndarray, "n blocks"], k: int
) -> Float[np.ndarray, "n k"]:
    """fp32 coefficients, k a row."""
    if codes.dtype == np.uint8:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)[:, :k].astype(np.int8) - np.int8(8)
    return codes.astype(np.float32) * np.repeat(scales, BLOCK, axis=1)[:, :k]


def entries(adapter: Adapter) -> list[Entry]:
    """Codes and scales of every coefficient vector."""
    bits, found = adapter.method.bits, []
    for target, pair in adapter.state.trained.items():
        for side, leaf in pair.items():
            shapes = _stored(leaf.shape, bits)
            dtypes = (_code_dtype(bits), np.dtype(np.float32))
            for part, name in enumerate(_names(target, side)):
                blocks = partial(_part, leaf, bits, part)
                found.append(Entry(name, shapes[part], blocks, dtypes[part]))
    return found


def _part(leaf: jax.Array, bits: int, part: int) -> tuple[np.ndarray, ...]:
    return (quantise(np.asarray(leaf), bits)[part],)


def _names(target: str, side: str) -> tuple[str, str]:
    return f"{target}.{side}.codes", f"{target}.{side}.scales"


def _stored(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    n, k = shape
    return (n, k if bits == 8 else -(-k // 2)), (n, -(-k // BLOCK))


def _code_dtype(bits: int) -> np.dtype[Any]:
    return np.dtype(np.int8 if bits == 8 else np.uint8)


def read(method: NOLA, file: AdapterFile, model: Model) -> State:
    """The state from a file of 8- or 4-bit coefficients."""
    fresh = method.init(model, jax.random.key(0)).state
    shapes = {(t, side): leaf.shape for t, pair in fresh.trained.items() for side, leaf in pair.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for site, shape in shapes.items():
        expected |= dict(zip(_names(*site), _stored(shape, method.bits), strict=True))
    file.check(expected)
    trained: dict[str, dict[str, jax.Array]] = {}
    for (target, side), (_, k) in shapes.items():
        codes, scales = (file.read(name) for name in _names(target, side))
        if codes.dtype != _code_dtype(method.bits):
            raise InputError(
                f"{file.path}: {_names(target, side)[0]} is {codes.dtype}; its config says {method.bits} bits"
            )
        value = dequantise(codes, np.asarray(scales, np.float32), k)
        trained.setdefault(target, {})[side] = place(model.layout, (None, None), value)
    return State(trained, fresh.constant)


# --- the expansion to LoRA ---


def expanded(adapter: Adapter) -> Adapter:
    """The same change of the base as a LoRA adapter, on the adapter's devices, one target in host memory at a time.

    Coefficients are rounded to fixed point, 2^-35 of a vector's largest (for 512 bases), such that every product with
    an integer basis and every sum is exact in float64: no order of summation, hence no mesh, machine or BLAS, changes
    a bit. Then come one multiplication, the offset's addition and one rounding to fp32.
    """
    method, config = adapter.method, adapter.config
    method.check_version("NOLA")
    lora = method.lora()
    numbers = {t: list(by_layer) for t, by_layer in method.sites(config).items()}
    cached: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def factors(site: FactorSite) -> Factors:
        if site.target not in cached:
            cached.clear()
            cached[site.target] = _target_factors(adapter, site.target)
        row = numbers[site.target].index(site.layer)
        a, b = (factor[row] for factor in cached[site.target])
        (_, into), (out, _) = site.shapes
        return Factors(a[:into].T, b[:out])

    state = device_state(lora, config, layout_of(adapter), factors)
    return Adapter(lora, state, config, adapter.base)


def layout_of(adapter: Adapter) -> Layout:
    """The layout of an adapter's devices."""
    sharding = jax.tree.leaves(adapter.state.trained)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(sharding.mesh, jax.sharding.Mesh):
        return Layout(sharding.mesh)
    return single_device(next(iter(sharding.device_set)))


def _target_factors(adapter: Adapter, target: str) -> tuple[np.ndarray, np.ndarray]:
    """A [n, in, r] and B^T [n, out, r] of one target's adapted layers, fp32."""
    method, shape = adapter.method, site_shape(adapter.config, target)
    layers = np.asarray(adapter.state.constant["sites"][target]["layers"])
    a, b = (_sums(adapter, target, side, layers, shape) for side in "ab")
    if method.variant == "offset":
        keys = offset_keys(method.basis_seed, target, jnp.asarray(layers))
        drawn = np.asarray(uniform(keys, jnp.arange(a.shape[1], dtype=jnp.uint32)), np.float64)
        a += drawn / math.sqrt(shape.in_size)
    shaped = (len(layers), -1, method.rank)
    return a.astype(np.float32).reshape(shaped), b.astype(np.float32).reshape(shaped)


def _sums(adapter: Adapter, target: str, side: str, layers: np.ndarray, shape: LinearShape) -> np.ndarray:
    """k^-1/2 sum_i c_i basis_i, float64 [n, units * r]."""
    method = adapter.method
    elements = (shape.in_size if side == "a" else shape.out_size) * method.rank
    fixed, unit = fixed_point(np.asarray(adapter.state.trained[target][side]))
    keys = side_keys(method, jnp.uint32(method.basis_seed), side, target, jnp.asarray(layers))
    out = np.empty((len(layers), elements))
    step = max(1, CHUNK // method.bases)
    for start in range(0, elements, step):
        numbers = jnp.arange(start, min(start + step, elements), dtype=jnp.uint32)
        columns = slice(start, start + numbers.size)
        if keys.ndim == 1:
            out[:, columns] = fixed @ _integers(keys, numbers)
        else:
            for row, row_keys in enumerate(keys):
                out[row, columns] = fixed[row] @ _integers(row_keys, numbers)
    return out * (unit / (LEVELS * math.sqrt(method.bases)))


_basis = jax.jit(basis)


def _integers(keys: jax.Array, numbers: jax.Array) -> np.ndarray:
    """Odd integers of -255..255, float64 [bases, elements]."""
    return np.asarray(_basis(keys, numbers), np.float64) * LEVELS


def fixed_point(coefficients: Float[np.ndarray, "n k"]) -> tuple[np.ndarray, np.ndarray]:
    """float64 whole numbers [n, k] and each row's unit [n, 1], such that sums of k products with 0..255 are exact."""
    bits = 53 - (LEVELS - 1).bit_length() - (coefficients.shape[1] - 1).bit_length()
    _, exponents = np.frexp(np.abs(coefficients).max(axis=1, keepdims=True))
    unit = np.ldexp(1.0, exponents - bits)
    return np.rint(coefficients.astype(np.float64) / unit), unit
