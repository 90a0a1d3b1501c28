"""Adapters on disk: PEFT directories for the methods that PEFT has, Jora's own format for the others.

PEFT's:      adapter_config.json, adapter_model.safetensors, and jora.json with the base's fingerprint
             (PEFT warns of keys that it does not know in its own config, and ignores other files).
Jora's own:  jora.json with the method's name and options too, and adapter_model.safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import jora
from jora.errors import InputError
from jora.files import atomic_directory
from jora.methods import registry
from jora.methods.method import Adapter, Method, State
from jora.models.model import Model, resolve
from jora.models.safetensors_file import Entry, write_safetensors
from jora.models.saving import check_replaceable
from jora.models.source import read_json
from jora.sharding import Layout

PEFT_CONFIG, WEIGHTS, OWN_CONFIG = "adapter_config.json", "adapter_model.safetensors", "jora.json"


class PeftFiles(NamedTuple):
    """What a PEFT directory holds: adapter_config.json (without the base's name) and the tensors."""

    config: dict[str, Any]
    tensors: list[Entry]


class PeftReader(Protocol):
    """Reads one `peft_type`: from the parsed adapter_config.json (found at `where`) and the tensors."""

    def __call__(
        self, peft: Mapping[str, Any], file: AdapterFile, model: Model, where: str
    ) -> tuple[Method, State]: ...


def save_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Write an adapter: as `peft.PeftModel.from_pretrained` loads it where PEFT has the method, else in Jora's format.

    Tensors come to the host one at a time. An existing adapter directory is replaced when the new one is whole.
    Raises InputError for an existing directory that holds something else.
    """
    method, target = adapter.method, Path(directory).expanduser()
    peft = method.to_peft(adapter)
    check_replaceable(target, OWN_CONFIG if (target / OWN_CONFIG).exists() else PEFT_CONFIG)
    base = dict(adapter.base)
    own: dict[str, Any] = {"version": jora.__version__, "base": base}
    with atomic_directory(target) as temporary:
        if peft is None:
            own |= {"method": method.name, "options": method_options(method)}
        else:
            _write_json(temporary / PEFT_CONFIG, {**peft.config, "base_model_name_or_path": base.get("name", "")})
        tensors = method.tensors(adapter) if peft is None else peft.tensors
        write_safetensors(temporary / WEIGHTS, tensors, np.dtype(np.float32))
        _write_json(temporary / OWN_CONFIG, own)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def method_options(method: Any) -> dict[str, Any]:
    """A method's options as plain JSON / YAML values."""
    return {field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def load_adapter(path: str | os.PathLike[str], model: Model) -> Adapter:
    """Load an adapter (a directory or a hub id) for `model`, laid out on its devices.

    Warns (UserWarning) where the adapter was made for another base. Raises InputError, by name, for options
    that Jora does not have, and for missing, unknown, misshapen or non-finite tensors.
    """
    directory = locate_adapter(path)
    own = read_json(directory / OWN_CONFIG) if (directory / OWN_CONFIG).is_file() else {}
    if not (directory / WEIGHTS).is_file():
        raise InputError(
            f"{directory}: has no {WEIGHTS}; save the adapter again with save_pretrained(..., safe_serialization=True)"
            " (Jora reads no pickled .bin file)"
        )
    file = AdapterFile(directory / WEIGHTS)
    recorded = own.get("base") or {}
    named = recorded.get("name", "")
    if "method" in own:
        method = _own_method(own, directory / OWN_CONFIG)
        state = method.restore(file, model)
    else:
        peft = read_json(directory / PEFT_CONFIG)
        named = named or peft.get("base_model_name_or_path") or ""
        method, state = _peft_reader(peft, directory)(peft, file, model, str(directory / PEFT_CONFIG))
    return Adapter(method, state, model.config, _base(directory, recorded, named, model))


def _own_method(own: dict[str, Any], path: Path) -> Method:
    name = str(own["method"])
    if name not in registry.names():
        raise InputError(f"{path}: method {name!r} is not known; import the module that registers it first")
    try:
        return registry.method_class(name)(**own.get("options", {}))
    except TypeError as error:
        raise InputError(f"{path}: options of another version of {name}: {error}") from None


def _peft_reader(peft: dict[str, Any], directory: Path) -> PeftReader:
    kind = str(peft.get("peft_type"))
    if kind not in registry.PEFT_READERS:
        known = ", ".join(registry.PEFT_READERS)
        raise InputError(f"{directory / PEFT_CONFIG}: peft_type {kind!r} is not supported; supported: {known}")
    return registry.load_object(registry.PEFT_READERS[kind])


def locate_adapter(path: str | os.PathLike[str]) -> Path:
    """The directory of an adapter, fetched from the hub where it is an id. Raises InputError where there is none."""
    local = Path(path).expanduser()
    if not local.exists():
        text = os.fspath(path)
        if text.startswith((".", "/", "~")) or text.count("/") != 1:
            raise InputError(f"{text}: no such adapter; give an adapter directory or a hub id like org/name")
        local = resolve(text)
    if not (local / PEFT_CONFIG).is_file() and not (local / OWN_CONFIG).is_file():
        raise InputError(f"{path}: holds no {PEFT_CONFIG} and no {OWN_CONFIG}; give an adapter directory")
    return local


def _base(directory: Path, recorded: Mapping[str, str], name: str, model: Model) -> dict[str, str]:
    """The base the adapter says it belongs to; warns where that is not `model`."""
    here = model.identity
    if "fingerprint" in recorded and "fingerprint" in here:
        same = recorded["fingerprint"] == here["fingerprint"]
    else:
        # PEFT records a name alone, and the same model may lie elsewhere: only its last part tells.
        same = not name or PurePath(name).name == PurePath(here["name"]).name
    if not same:
        then, now = (f"{base.get('fingerprint', 'not recorded')}" for base in (recorded, here))
        made, used = f"{name!r} (fingerprint {then})", f"{here['name']!r} ({now})"
        warnings.warn(f"{directory}: made for base {made}, used with {used}", UserWarning, stacklevel=3)
    return dict(recorded or here)


class AdapterFile:
    """adapter_model.safetensors, read a tensor at a time."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); save the adapter again") from error
        self.path = path

    def names(self) -> frozenset[str]:
        return frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def check(self, expected: Mapping[str, tuple[int, ...]], also: Collection[str] = ()) -> None:
        """Raise InputError for a missing, unknown or misshapen tensor; those named in `also` may be there."""
        found = self.names()
        if missing := sorted(expected.keys() - found):
            raise InputError(f"{self.path}: lacks {missing[0]} (of {len(missing)} missing) that its config asks for")
        if unknown := sorted(found - expected.keys() - set(also)):
            raise InputError(f"{self.path}: tensor {unknown[0]} is not one that its config asks for")
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise InputError(
                    f"{self.path}: {name} has shape {self.shape(name)}; this model and its config ask for {shape}"
                )

    def rows(self, name: str) -> Any:
        """A tensor that can be sliced without reading the rest."""
        return self._file.get_slice(name)

    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype. Raises InputError where it is not finite."""
        value = self._file.get_tensor(name)
        if value.dtype.kind not in "iub" and not np.isfinite(value.astype(np.float32)).all():
            raise InputError(f"{self.path}: {name} holds NaN or infinity; the training that made it diverged")
        return value


# --- Jora's own format: the trained leaves by their path ---


def leaf_entries(trained: Any) -> list[Entry]:
    """Every leaf as a tensor named by its path, like "q_proj.a"."""
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    return [Entry(_path(path), leaf.shape, partial(whole, leaf)) for path, leaf in leaves]


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def whole(leaf: jax.Array) -> tuple[np.ndarray, ...]:
    """A leaf on the host, as the blocks of an `Entry`."""
    return (np.asarray(leaf),)


def restore_leaves(method: Method, file: AdapterFile, model: Model) -> State:
    """`init`'s state with the trained leaves of the file."""
    fresh = method.init(model, jax.random.key(0)).state
    leaves, structure = jax.tree_util.tree_flatten_with_path(fresh.trained)
    file.check({_path(path): leaf.shape for path, leaf in leaves})
    read = [np.asarray(file.read(_path(path)), leaf.dtype) for path, leaf in leaves]
    host = jax.tree.unflatten(structure, read)
    axes = method.axes(model.config).trained
    return State(jax.tree.map(lambda value, a: place(model.layout, a, value), host, axes), fresh.constant)


def place(layout: Layout, axes: tuple[str | None, ...], value: np.ndarray) -> jax.Array:
    """A host array on its devices, by logical axes."""
    return jax.make_array_from_callback(value.shape, layout.sharding(axes, value.shape), lambda index: value[index])
