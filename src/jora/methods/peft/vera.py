"""VeRA adapters as PEFT stores them: adapter_config.json and the tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jora.errors import InputError
from jora.methods.layer_sites import layer_masks
from jora.methods.method import Adapter, State
from jora.methods.peft.options import REMEDY, check_numbers, read_targets, refuse_unknown, written_targets
from jora.methods.storage import AdapterFile, PeftFiles, place
from jora.methods.vera import VeRA, host_projections
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.safetensors_file import Entry
from jora.models.tensors import linear_shape

_KNOWN = (
    "r",
    "target_modules",
    "vera_dropout",
    "d_initial",
    "projection_prng_key",
    "save_projection",
    "init_weights",
    "layers_to_transform",
)
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
_VECTORS = {"d": "vera_lambda_d", "b": "vera_lambda_b"}


def write_peft(adapter: Adapter) -> PeftFiles:
    """What a PEFT directory of this adapter holds; tensors are fp32, the random matrices among them."""
    method, config = adapter.method, adapter.config
    chosen = method.chosen(config)
    entries = [
        Entry(name, shape, partial(_projection, adapter, part))
        for part, (name, shape) in enumerate(_projection_shapes(method, config).items())
    ]
    for module, (target, layer) in chosen.items():
        for vector, (name, shape) in _vector_shapes(method, config, module, target).items():
            entries.append(Entry(name, shape, partial(_vector, adapter, target, vector, layer)))
    peft = {
        "peft_type": "VERA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": method.rank,
        "target_modules": written_targets(config, chosen),
        "layers_to_transform": None,  # target_modules name whole modules where only some layers are adapted
        "vera_dropout": method.dropout,
        "d_initial": method.d_initial,
        "projection_prng_key": method.projection_prng_key,
        "save_projection": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
        "modules_to_save": None,
    }
    return PeftFiles(peft, entries)


def _projection_shapes(method: VeRA, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    into, out = method.sizes(config)
    return dict(zip(_PROJECTIONS, ((method.rank, into), (out, method.rank)), strict=True))


def _vector_shapes(
    method: VeRA, config: ModelConfig, module: str, target: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{"d" or "b": (tensor, shape)} of one module."""
    shapes = {"d": (method.rank,), "b": (linear_shape(config, target).out_size,)}
    return {v: (f"base_model.model.{module}.{_VECTORS[v]}", shape) for v, shape in shapes.items()}


def _projection(adapter: Adapter, part: int) -> tuple[np.ndarray, ...]:
    return (host_projections(adapter)[part],)


def _vector(adapter: Adapter, target: str, vector: str, layer: int) -> tuple[np.ndarray, ...]:
    return (np.asarray(adapter.state.trained[target][vector][layer]).reshape(-1),)


def read_peft(peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str) -> tuple[VeRA, State]:
    """The method and its state from a directory of peft_type VERA (`storage.PeftReader`)."""
    config, layout = model.config, model.layout
    method = _from_peft(peft, config, where)
    if missing := sorted(set(_PROJECTIONS) - file.names()):
        raise InputError(
            f"{file.path}: lacks {missing[0]}, which only torch's generator can draw again; train with"
            f" save_projection=True, or {REMEDY}"
        )
    chosen = method.chosen(config)
    tensors = {module: _vector_shapes(method, config, module, target) for module, (target, _) in chosen.items()}
    file.check(_projection_shapes(method, config) | dict(pair for named in tensors.values() for pair in named.values()))
    masks = layer_masks(config, chosen.values())
    trained = {target: _first_vectors(method, config, target) for target in masks}
    for module, (target, layer) in chosen.items():
        for vector, (name, _) in tensors[module].items():
            stack = trained[target][vector]
            stack[layer] = file.read(name).reshape(stack.shape[1:])
    projections = {
        part: np.asarray(file.read(name), np.float32).T for part, name in zip("ab", _PROJECTIONS, strict=True)
    }
    state = State(trained, {"projections": projections, "adapted": masks})
    return method, jax.tree.map(lambda x, axes: place(layout, axes, x), state, method.axes(config))


def _first_vectors(method: VeRA, config: ModelConfig, target: str) -> dict[str, np.ndarray]:
    """The vectors of a fresh adapter: those of layers that are not adapted stay so."""
    d = np.full((config.layers, method.rank), method.d_initial, np.float32)
    return {"d": d, "b": np.zeros((config.layers, *linear_shape(config, target).out_shape), np.float32)}


def _from_peft(peft: Mapping[str, Any], config: ModelConfig, where: str) -> VeRA:
    refuse_unknown(peft, _KNOWN, where)
    check_numbers(where, {"r": peft.get("r", 256), "projection_prng_key": peft.get("projection_prng_key", 0)}, int)
    rates = {"vera_dropout": peft.get("vera_dropout") or 0.0, "d_initial": peft.get("d_initial", 0.1)}
    check_numbers(where, rates, (int, float))
    layers = peft.get("layers_to_transform")
    return VeRA(
        rank=peft.get("r", 256),
        targets=read_targets(peft, config, where),
        dropout=rates["vera_dropout"],
        d_initial=rates["d_initial"],
        projection_prng_key=peft.get("projection_prng_key", 0),
        layers_to_transform=None if layers == [] else layers,
    )
