"""IA3 adapters as PEFT stores them: adapter_config.json and the tensors, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jora.errors import InputError
from jora.methods.ia3 import IA3, Side, features, host_factors
from jora.methods.layer_sites import layer_masks
from jora.methods.method import Adapter, State
from jora.methods.peft.options import read_targets, refuse_unknown, written_targets
from jora.methods.storage import AdapterFile, PeftFiles, place
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.safetensors_file import Entry

_KNOWN = ("target_modules", "feedforward_modules", "exclude_modules", "init_ia3_weights")


def write_peft(adapter: Adapter) -> PeftFiles:
    """What a PEFT directory of this adapter holds; tensors are fp32."""
    method, config = adapter.method, adapter.config
    chosen, sides = method.chosen(config), method.sides(config)
    entries = []
    for name, (target, layer) in chosen.items():
        shape = _peft_shape(config, target, sides[target])
        blocks = partial(_blocks, adapter, target, sides[target], layer, shape)
        entries.append(Entry(_tensor(name), shape, blocks))
    modules = written_targets(config, chosen)
    scaled_inputs = [name for name in modules if sides[name.rpartition(".")[2]] == "input"]
    peft = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": modules,
        "feedforward_modules": scaled_inputs,
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }
    return PeftFiles(peft, entries)


def _tensor(module: str) -> str:
    return f"base_model.model.{module}.ia3_l"


def _peft_shape(config: ModelConfig, target: str, side: Side) -> tuple[int, int]:
    size = int(np.prod(features(config, target, side)))
    return (1, size) if side == "input" else (size, 1)


def _blocks(adapter: Adapter, target: str, side: Side, layer: int, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    return (host_factors(adapter, target, side, layer).reshape(shape),)


def read_peft(peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str) -> tuple[IA3, State]:
    """The method and its state from a directory of peft_type IA3 (`storage.PeftReader`)."""
    config = model.config
    method = _from_peft(peft, config, where)
    chosen, sides = method.chosen(config), method.sides(config)
    file.check({_tensor(name): _peft_shape(config, target, sides[target]) for name, (target, _) in chosen.items()})
    masks = layer_masks(config, chosen.values())
    factors = {t: np.ones((config.layers, *features(config, t, side)), np.float32) for t, side in sides.items()}
    for name, (target, layer) in chosen.items():
        factors[target][layer] = file.read(_tensor(name)).reshape(factors[target].shape[1:])
    state = State({target: {side: factors[target]} for target, side in sides.items()}, masks)
    return method, jax.tree.map(lambda x, axes: place(model.layout, axes, x), state, method.axes(config))


def _from_peft(peft: Mapping[str, Any], config: ModelConfig, where: str) -> IA3:
    refuse_unknown(peft, _KNOWN, where)
    feedforward = peft.get("feedforward_modules")
    if feedforward is None:
        raise InputError(f"{where}: feedforward_modules is missing; name the targets whose input is scaled, or []")
    return IA3(
        targets=read_targets(peft, config, where),
        feedforward_modules=feedforward,
        exclude_modules=peft.get("exclude_modules") or (),
    )
