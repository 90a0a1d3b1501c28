"""nf4 against bitsandbytes, and on every mesh against itself."""

from __future__ import annotations

import json
import math
from typing import Any

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

from jora.errors import InputError
from jora.quant import Pieces, QuantisedWeight, host_type
from jora.quant.codebooks import NF4, dynamic
from jora.quant.nf4_host import STATE, NF4Tensor
from jora.sharding import Layout
from jora.sharding.layout import make_layout

SHAPES = [(96, 512), (30, 30), (7, 33), (100, 80)]  # the last three: blocks cross rows, the last block is short


def weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantised(w: np.ndarray, kind: str = "nf4", piece: int = 1000) -> Any:
    return host_type(kind).quantise(w.shape, lambda start, stop: w[start:stop], piece)  # type: ignore[arg-type]


def test_code_books() -> None:
    np.testing.assert_array_equal(NF4, bnb.get_4bit_type("nf4", device="cpu").numpy())
    quantiles = bnb.create_normal_map().numpy()
    np.testing.assert_array_equal(NF4, np.sort(np.r_[quantiles[quantiles != 0], 0].astype(np.float32)))
    np.testing.assert_array_equal(dynamic(), bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_quantising_agrees_with_bitsandbytes(shape: tuple[int, int]) -> None:
    w = weight(shape)
    ours = quantised(w)
    codes, state = bnb.quantize_4bit(torch.from_numpy(w), quant_type="nf4", compress_statistics=True)
    np.testing.assert_array_equal(ours.codes, codes.numpy().reshape(-1))
    assert ours.offset == pytest.approx(float(state.offset), rel=1e-6)
    np.testing.assert_allclose(ours.nested, state.state2.absmax.numpy(), rtol=1e-5)
    # bitsandbytes' CPU library looks a scale's code up in a coarse table: a few are not the nearest.
    theirs = state.absmax.numpy()
    assert np.mean(ours.scales == theirs) > 0.99
    flat = np.pad(w.reshape(-1), (0, -w.size % 64)).reshape(-1, 64)
    centred = (np.abs(flat).max(axis=1) - ours.offset) / np.repeat(ours.nested, 256)[: len(flat)]
    assert np.all(np.abs(dynamic()[ours.scales] - centred) <= np.abs(dynamic()[theirs] - centred) + 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_bitsandbytes_reads_from_our_tensors(shape: tuple[int, int]) -> None:
    ours = quantised(weight(shape))
    stored = {name: torch.from_numpy(value.copy()) for name, value in ours.stored("w", "float32").items()}
    assert {name: (tuple(t.shape), t.numpy().dtype) for name, t in stored.items()} == {
        name: (size, np.dtype(kind)) for name, (size, kind) in NF4Tensor.stored_shapes("w", shape).items()
    }
    codes = stored.pop("w")
    state = bnb.QuantState.from_dict(stored, torch.device("cpu"))
    assert tuple(state.shape) == shape
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # The plain implementation: the CPU library's is wrong where a row is shorter than a block.
    dense = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, 64, shape, torch.float32).numpy()
    np.testing.assert_array_equal(ours.dense(0, shape[0]), dense)
    np.testing.assert_array_equal(ours.dense(3, 6), dense[3:6])


def test_pieces_of_any_size_quantise_alike() -> None:
    w = weight((100, 80))
    one, many = quantised(w, piece=1 << 20), quantised(w, piece=1)
    assert all(np.array_equal(getattr(one, n), getattr(many, n)) for n in ("codes", "scales", "nested", "offset"))


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.093), ("int8", 0.009)])
def test_error_of_normal_weights(kind: str, most: float) -> None:
    """Relative, in the Frobenius norm; a wrong table or a misplaced scale is far beyond."""
    w = weight((256, 2048))
    error = np.linalg.norm(quantised(w, kind).dense(0, 256) - w) / np.linalg.norm(w)
    assert 0.5 * most < error < most


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_stay_zero(kind: str) -> None:
    w = weight((8, 64))
    w[2] = 0
    assert not quantised(w, kind).dense(2, 3).any()
    assert not quantised(np.zeros((8, 64), np.float32), kind).dense(0, 8).any()


# name: ([*in], axes, [*out], axes, mesh as data, fsdp, tensor_kv, tensor_rep)
EMBED, MLP, HEADS = ("embed",), ("mlp",), ("kv_heads", "q_group", None)
CUTS: dict[str, tuple[Any, ...]] = {
    "one device": ((128,), EMBED, (3, 2, 8), HEADS, (1, 1, 1, 1)),
    "one device, short rows": ((30,), EMBED, (3, 2, 5), HEADS, (1, 1, 1, 1)),
    "outputs over tensor": ((128,), EMBED, (4, 2, 8), HEADS, (1, 1, 4, 2)),
    "inputs over fsdp, whole blocks": ((256,), EMBED, (64,), MLP, (1, 4, 2, 1)),
    "inputs over fsdp, cut blocks": ((96,), EMBED, (10,), MLP, (2, 4, 1, 1)),
    "inputs over fsdp, odd pieces": ((30,), EMBED, (10,), MLP, (1, 2, 2, 1)),
    "inputs over tensor, outputs over fsdp": ((256,), MLP, (20,), EMBED, (1, 2, 2, 2)),
    "heads in runs, whole blocks": ((4, 2, 64), HEADS, (6,), EMBED, (1, 2, 2, 2)),
    "heads in runs, cut blocks": ((6, 4, 10), HEADS, (6,), EMBED, (1, 2, 2, 2)),
    "nothing is divided": ((30,), EMBED, (7,), MLP, (1, 4, 2, 1)),
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", CUTS)
def test_a_mesh_changes_no_value(name: str, kind: str, cpu_devices: list[jax.Device]) -> None:
    """Whatever the cut: the canonical values on every device, collected over fsdp or not, and the file's bytes back."""
    in_shape, in_axes, out_shape, out_axes, mesh = CUTS[name]
    layout: Layout = make_layout(*mesh, cpu_devices)
    shape, axes = (*in_shape, *out_shape), (*in_axes, *out_axes)
    pieces = Pieces.of(layout, shape, axes, len(out_shape))
    host = quantised(weight((math.prod(out_shape), math.prod(in_shape))), kind)
    arrays = host.arrays(pieces)
    fields = host.weight.fields(pieces)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {n: (f.shape, f.dtype) for n, f in fields.items()}
    placed = {n: jax.device_put(a, jax.NamedSharding(layout.mesh, fields[n].spec)) for n, a in arrays.items()}
    device: QuantisedWeight = host.weight(shape=shape, **placed)
    expected = host.dense(0, host.shape[0]).T.reshape(shape)
    both = jax.jit(lambda w: [w.dequantise(pieces, jnp.float32, collect=collect) for collect in (False, True)])
    apart, collected = both(device)
    np.testing.assert_allclose(apart, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(apart, collected)
    assert apart.sharding.is_equivalent_to(layout.sharding(axes, shape), len(shape))
    spec = layout.spec(axes, shape)
    without = jax.NamedSharding(layout.mesh, jax.P(*(None if part == "fsdp" else part for part in spec)))
    assert collected.sharding.is_equivalent_to(without, len(shape))
    back = host.collect({n: np.asarray(a) for n, a in placed.items()}, pieces)
    for part, value in host.stored("w", "float32").items():
        np.testing.assert_array_equal(back.stored("w", "float32")[part], value)


@pytest.mark.parametrize("mesh", [(1, 1, 1, 1), (1, 4, 2, 1)])
@pytest.mark.parametrize(("kind", "least", "most"), [("nf4", 4.125, 4.2), ("int8", 8.0, 8.1)])
def test_bits_of_a_parameter(kind: str, least: float, most: float, mesh: Any, cpu_devices: list[jax.Device]) -> None:
    """All arrays, scales included, over all devices."""
    shape = (2048, 4096)
    pieces = Pieces.of(make_layout(*mesh, cpu_devices), shape, ("embed", "mlp"), 1)
    leaves = jax.tree.leaves(host_type(kind).weight.abstract(1, shape, pieces))
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)
    assert least < held * 8 * math.prod(mesh) / math.prod(shape) <= most


def broken(**changes: Any) -> dict[str, np.ndarray]:
    stored = quantised(weight((8, 64))).stored("w", "float32")
    state = {**json.loads(stored["w" + STATE].tobytes()), **changes}
    return {**stored, "w" + STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def test_other_forms_are_refused_by_name() -> None:
    for changes, message in [
        ({"quant_type": "fp4"}, "w: quant_type is fp4, not nf4"),
        ({"blocksize": 128}, "w: blocksize is 128, not 64"),
        ({"nested_blocksize": None}, "w: nested_blocksize is None"),
        ({"shape": [8, 128]}, "w: cut short"),
    ]:
        with pytest.raises(InputError, match=message):
            NF4Tensor.load("w", broken(**changes).__getitem__)
    other = {**broken(), "w.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}
    with pytest.raises(InputError, match="w: its code book"):
        NF4Tensor.load("w", other.__getitem__)
    with pytest.raises(InputError, match="quant 'fp4' is not known; use int8 or nf4"):
        host_type("fp4")
