"""NOLA's files: coefficients and a seed, nothing else; exports that are the same bytes on every mesh."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.methods.peft_oracle import base, peft_loaded
from tests.methods.test_nola import METHOD, SHAPES, random_nola
from tests.tiny import assert_close, logits, tokens

import jora
from jora.methods.method import Adapter, State
from jora.methods.nola import NOLA
from jora.methods.nola_files import dequantise, entries, fixed_point, quantise
from jora.methods.storage import load_adapter, save_adapter

WEIGHTS = "adapter_model.safetensors"
COEFFICIENTS = 2 * (3 * 3 + 1) * METHOD.bases  # three targets in three layers, and lm_head


def saved(folder: Path, **options: Any) -> tuple[Adapter, Path]:
    adapter = random_nola(base("llama3"), dataclasses.replace(METHOD, **options))
    save_adapter(adapter, folder)
    return adapter, folder / WEIGHTS


@pytest.mark.parametrize("basis", ["shared", "unique"])
def test_a_file_holds_the_coefficients_and_no_more(basis: Any, tmp_path: Path) -> None:
    adapter, path = saved(tmp_path / "adapter", basis=basis)
    tensors = load_file(path)
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * COEFFICIENTS
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{target}.{side}": (1 if target == "lm_head" else 3, METHOD.bases)
        for target in METHOD.targets
        for side in "ab"
    }
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 4 * COEFFICIENTS
    assert header < 120 * len(tensors)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [WEIGHTS, "jora.json"]
    options = json.loads((tmp_path / "adapter" / "jora.json").read_text())["options"]
    assert (options["basis_seed"], options["basis_version"]) == (5, 1)
    loaded = load_adapter(tmp_path / "adapter", base("llama3"))
    assert loaded.method == adapter.method
    for ours, theirs in zip(jax.tree.leaves(loaded.state), jax.tree.leaves(adapter.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4])
def test_coefficients_in_few_bits(bits: Any, tmp_path: Path) -> None:
    adapter, path = saved(tmp_path / "adapter", bits=bits, bases=71)  # two blocks a vector, and half a byte over
    codes = {name: t for name, t in load_file(path).items() if name.endswith("codes")}
    assert len(codes) == 8
    assert sum(t.nbytes for t in codes.values()) == 20 * (71 if bits == 8 else 36)
    loaded = load_adapter(tmp_path / "adapter", base("llama3"))
    for target, pair in adapter.state.trained.items():
        for side in "ab":
            true, found = np.asarray(pair[side]), np.asarray(loaded.state.trained[target][side])
            for block in (slice(0, 64), slice(64, 71)):
                largest = np.abs(true[:, block]).max(axis=1, keepdims=True)
                step = largest / (127 if bits == 8 else 7)
                assert np.all(np.abs(found - true)[:, block] <= step * 0.5001)
                assert np.any(np.abs(found - true)[:, block] > 0)
            # What was read is written as it is.
            for again, first in zip(quantise(found, bits), quantise(true, bits), strict=True):
                np.testing.assert_allclose(again, first, rtol=1e-6)


def test_the_format_of_few_bits() -> None:
    row = np.array([[7.0, -3.5, 0.4, -7.0, 2.0]], np.float32)
    codes, scales = quantise(row, 4)
    assert (codes.tolist(), scales.tolist()) == ([[15 | 4 << 4, 8 | 1 << 4, 10 | 8 << 4]], [[1.0]])
    assert dequantise(codes, scales, 5).tolist() == [[7.0, -4.0, 0.0, -7.0, 2.0]]
    codes, scales = quantise(np.zeros((1, 3), np.float32), 8)
    assert (codes.dtype, codes.tolist(), dequantise(codes, scales, 3).tolist()) == (np.int8, [[0] * 3], [[0.0] * 3])


def test_a_7b_adapter_in_four_bits_is_28_kilobytes() -> None:
    layers, *_, bases, _, count = SHAPES["7B"]
    leaf = jax.ShapeDtypeStruct((layers, bases), np.float32)
    trained = {f"{n}": {"a": leaf, "b": leaf} for n in range(7)}
    found = entries(Adapter(NOLA(bases=bases, bits=4), State(trained, {}), base("llama3").config))
    sizes = {kind: sum(np.prod(e.shape) for e in found if e.name.endswith(kind)) for kind in ("codes", "scales")}
    assert sizes == {"codes": 28_672, "scales": count // 64}


def test_exports_are_the_same_bytes_on_every_mesh(tmp_path: Path) -> None:
    """And PEFT computes from them what the adapter computes here."""
    one, many = base("llama3"), base("llama3", "fsdp=2,tensor=2")
    adapter = random_nola(one, METHOD)
    save_adapter(adapter, tmp_path / "own")
    save_adapter(METHOD.to_lora(adapter), tmp_path / "one")
    save_adapter(METHOD.to_lora(load_adapter(tmp_path / "own", many)), tmp_path / "four")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "four" / WEIGHTS).read_bytes()
    assert_close(one(tokens(), adapter), logits(peft_loaded("llama3", tmp_path / "one"), tokens()), 1e-4)


def test_expansion_sums_without_rounding() -> None:
    """Whatever the order: fixed-point coefficients times integers stay below 2^53."""
    draw = np.random.default_rng(0)
    coefficients = (draw.standard_normal((2, 512)) * 10.0 ** draw.integers(-6, 3, (2, 512))).astype(np.float32)
    fixed, unit = fixed_point(coefficients)
    assert np.all(fixed == np.rint(fixed)) and np.abs(fixed).sum(axis=1).max() * 255 <= 2**53
    assert np.all(np.abs(fixed * unit - coefficients) <= np.abs(coefficients).max(axis=1, keepdims=True) * 2.0**-35)
    odd = 2.0 * draw.integers(0, 256, (512, 50)) - 255
    exact = [[sum(int(c) * int(o) for c, o in zip(row, column, strict=True)) for column in odd.T] for row in fixed]
    for order in (slice(None), slice(None, None, -1), draw.permutation(512)):
        assert (fixed[:, order] @ odd[order]).astype(int).tolist() == exact
    assert fixed_point(np.zeros((1, 4), np.float32))[0].tolist() == [[0.0] * 4]


def test_merging_adds_the_expanded_product() -> None:
    model, adapter = base("llama3"), random_nola(base("llama3"), METHOD)
    mergers = METHOD.mergers(adapter)
    assert len(mergers) == COEFFICIENTS // (2 * METHOD.bases)
    pair = METHOD.to_lora(adapter).state.trained["down_proj"]
    rows, start = slice(4, 9), np.asarray(model.params.layers.weights["down_proj"][1]).T[4:9]
    expected = start + 2 * (np.asarray(pair["a"][1]) @ np.asarray(pair["b"][1])).T[rows]
    np.testing.assert_allclose(mergers["down_proj", 1](start, rows), expected, rtol=0, atol=1e-5)


def test_files_that_are_refused(tmp_path: Path) -> None:
    model = base("llama3")
    _, path = saved(tmp_path)
    whole, config = path.read_bytes(), tmp_path / "jora.json"
    text = config.read_text()
    path.write_bytes(whole[:-40])
    with pytest.raises(jora.InputError, match="not a whole safetensors file"):
        load_adapter(tmp_path, model)
    path.write_bytes(whole)
    config.write_text(text.replace('"basis_version": 1', '"basis_version": 2'))
    with pytest.raises(jora.InputError, match=f"{path}: its random bases are of version 2 .* makes version 1; load it"):
        load_adapter(tmp_path, model)
    config.write_text(text.replace('"bases": 10', '"bases": 12'))
    with pytest.raises(jora.InputError, match=r"_proj.a has shape \(3, 10\); .* ask for \(3, 12\)"):
        load_adapter(tmp_path, model)
    config.write_text(text.replace('"bits": 32', '"bits": 8'))
    with pytest.raises(jora.InputError, match="lacks"):
        load_adapter(tmp_path, model)
    _, path = saved(tmp_path / "eight", bits=8)
    tensors = load_file(path)
    save_file({name: t.astype(np.int16) if t.dtype == np.int8 else t for name, t in tensors.items()}, path)
    with pytest.raises(jora.InputError, match=r"codes is int16; its config says 8 bits"):
        load_adapter(tmp_path / "eight", model)
