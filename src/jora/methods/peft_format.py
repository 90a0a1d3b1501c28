"""Adapters as PEFT directories: adapter_config.json and adapter_model.safetensors.

A third file, jora.json, records the base's fingerprint: PEFT warns of keys that it does not know in its own
config, and ignores other files.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path, PurePath
from typing import Any

import numpy as np

import jora
from jora.errors import InputError
from jora.files import atomic_directory
from jora.methods.factors import Factors, FactorSite, device_state, factor_sites, host_factors
from jora.methods.method import Adapter
from jora.methods.peft_config import REMEDY, from_peft, to_peft
from jora.models.model import Model, resolve
from jora.models.safetensors_file import Entry, write_safetensors
from jora.models.saving import BLOCK, DeviceTensor, check_replaceable, device_tensors
from jora.models.source import read_json

CONFIG, WEIGHTS, IDENTITY = "adapter_config.json", "adapter_model.safetensors", "jora.json"


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Write a LoRA adapter as a directory that `peft.PeftModel.from_pretrained` loads.

    Tensors are fp32 and have their true ranks; they come to the host one at a time. An existing adapter
    directory is replaced when the new one is whole. Raises InputError for an existing directory that holds
    something else.
    """
    target = Path(directory).expanduser()
    check_replaceable(target, CONFIG)
    entries = []
    for site in factor_sites(adapter.method, adapter.config):
        for part in (0, 1):
            entries.append(Entry(site.names[part], site.shapes[part], _Blocks(adapter, site, part)))
    base = dict(adapter.base)
    with atomic_directory(target) as temporary:
        write_safetensors(temporary / WEIGHTS, entries, np.dtype(np.float32))
        _write_json(temporary / CONFIG, to_peft(adapter.method, adapter.config, base.get("name", "")))
        _write_json(temporary / IDENTITY, {"version": jora.__version__, "base": base})


class _Blocks:
    """The rows of one factor, fetched from the devices when they are written."""

    def __init__(self, adapter: Adapter, site: FactorSite, part: int):
        self._adapter, self._site, self._part = adapter, site, part

    def __call__(self) -> tuple[np.ndarray, ...]:
        return (host_factors(self._adapter, self._site)[self._part],)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(path: str | os.PathLike[str], model: Model) -> Adapter:
    """Load a PEFT LoRA adapter (a directory or a hub id) for `model`, laid out on its devices in fp32.

    Warns (UserWarning) where the adapter was made for another base. Raises InputError, by name, for options
    that Jora does not have, and for missing, unknown, misshapen or non-finite tensors.
    """
    directory = _locate(path)
    peft = read_json(directory / CONFIG)
    method = from_peft(peft, model.config, str(directory / CONFIG))
    if not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory}: has no {WEIGHTS}; save the adapter again with save_pretrained(..., safe_serialization=True)"
            " (Jora reads no pickled .bin file)"
        )
    file = _AdapterFile(directory / WEIGHTS)
    file.check(factor_sites(method, model.config), model)
    state = device_state(method, model.config, model.layout, file.factors)
    return Adapter(method, state, model.config, _base(directory, peft, model))


def _locate(path: str | os.PathLike[str]) -> Path:
    local = Path(path).expanduser()
    if not local.exists():
        text = os.fspath(path)
        if text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise InputError(f"{text}: no such adapter; give a PEFT directory or a hub id like org/name")
        local = resolve(text)
    if not (local / CONFIG).is_file():
        raise InputError(f"{path}: holds no {CONFIG}; give a PEFT adapter directory")
    return local


def _base(directory: Path, peft: dict[str, Any], model: Model) -> dict[str, str]:
    """The base the adapter says it belongs to; warns where that is not `model`."""
    here = model.identity
    recorded = read_json(directory / IDENTITY).get("base", {}) if (directory / IDENTITY).is_file() else {}
    name = recorded.get("name") or peft.get("base_model_name_or_path") or ""
    if "fingerprint" in recorded and "fingerprint" in here:
        same = recorded["fingerprint"] == here["fingerprint"]
    else:
        # PEFT records a name alone, and the same model may lie elsewhere: only its last part tells.
        same = not name or PurePath(name).name == PurePath(here["name"]).name
    if not same:
        warnings.warn(f"{directory}: made for base {name!r}, used with {here['name']!r}", UserWarning, stacklevel=3)
    return dict(recorded or here)


class _AdapterFile:
    """adapter_model.safetensors, read a tensor at a time."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); save the adapter again") from error
        self._path = path

    def check(self, sites: list[FactorSite], model: Model) -> None:
        """Raise InputError for a missing, unknown or misshapen tensor, and for base weights that differ."""
        expected = {name: shape for site in sites for name, shape in zip(site.names, site.shapes, strict=True)}
        found = set(self._file.keys())
        if missing := sorted(expected.keys() - found):
            raise InputError(f"{self._path}: lacks {missing[0]} (of {len(missing)} missing) that {CONFIG} asks for")
        bases = _base_tensors(model)
        for name in sorted(found - expected.keys()):
            if name not in bases:
                raise InputError(f"{self._path}: tensor {name} is not one that {CONFIG} asks for; {REMEDY}")
            self._check_base(name, bases[name])
        for name, shape in expected.items():
            stored = tuple(self._file.get_slice(name).get_shape())
            if stored != shape:
                raise InputError(f"{self._path}: {name} has shape {stored}; this model and {CONFIG} ask for {shape}")

    def _check_base(self, name: str, tensor: DeviceTensor) -> None:
        """PEFT adds the embeddings' own weights where it adapts them; they must be this model's."""
        rows = self._file.get_slice(name)
        stored, here = tuple(rows.get_shape()), tensor.spec.hf_shape
        if stored != here:
            raise InputError(f"{self._path}: {name} has shape {stored}, the base's is {here}; {REMEDY}")
        step = max(1, BLOCK // (4 * here[1]))
        for start in range(0, here[0], step):
            stop = min(start + step, here[0])
            ours = tensor.read(start, stop)
            if not np.array_equal(rows[start:stop].astype(ours.dtype), ours):
                raise InputError(f"{self._path}: {name} differs from the base's own weight; {REMEDY}")

    def factors(self, site: FactorSite) -> Factors:
        """A and B of one site in fp32. Raises InputError where one is not finite."""
        pair = []
        for name in site.names:
            value = np.asarray(self._file.get_tensor(name), np.float32)
            if not np.isfinite(value).all():
                raise InputError(f"{self._path}: {name} holds NaN or infinity; the training that made it diverged")
            pair.append(value)
        return Factors(*pair)


def _base_tensors(model: Model) -> dict[str, DeviceTensor]:
    """Names under which PEFT stores the embeddings' own weights, beside an adapter of them."""
    tables = {t.site[0]: t for t in device_tensors(model.params, model.config) if t.site and t.site[1] is None}
    embed = tables["embed_tokens"]
    named = {"model.embed_tokens": embed, "lm_head": tables.get("lm_head", embed)}
    return {
        f"base_model.model.{module}.{suffix}": tensor
        for module, tensor in named.items()
        for suffix in ("weight", "base_layer.weight")
    }
