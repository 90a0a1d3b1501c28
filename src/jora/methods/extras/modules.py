"""modules_to_save, as PEFT has it: whole modules of the base that train beside an adapter, as copies in fp32.

The base's own weights stay as they are; the forward pass reads the copies (`Method.base`). A tied embedding is
copied for the use that is named alone, as in PEFT: the other use keeps the base's table.

Copies have the shape and the shardings of their weights. Those of the layers are stacks of the layers chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jora.errors import InputError
from jora.methods.method import ModuleSite, RowsMerger
from jora.methods.storage import AdapterFile
from jora.methods.targets import EMBED, HEAD
from jora.models.config import ModelConfig
from jora.models.loading import read_shard
from jora.models.params import Params
from jora.models.safetensors_file import Entry
from jora.models.saving import DeviceTensor
from jora.models.tensors import Axes, TensorSpec, bias_specs, norm_specs, top_specs, weight_specs
from jora.sharding import Layout

PREFIX = "base_model.model."  # before a module's name in a PEFT file


class Saved(NamedTuple):
    """One array that trains: a tensor outside the layers, or those of `layers` in a stack."""

    specs: tuple[TensorSpec, ...]
    layers: tuple[int, ...] | None
    sites: tuple[ModuleSite, ...]  # of each tensor, for merging

    @property
    def axes(self) -> Axes:
        return self.specs[0].axes if self.layers is None else (None, *self.specs[0].axes)

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """On the devices: a table has the padding of the base's."""
        first = self.specs[0]
        if self.layers is not None:
            return (len(self.layers), *first.shape)
        return (config.padded_vocab, *first.shape[1:]) if first.axes[0] == "vocab" else first.shape

    def tensors(self, array: Array) -> Iterator[DeviceTensor]:
        """Each tensor of the array, for reading it in Hugging Face's layout."""
        for place, (spec, site) in enumerate(zip(self.specs, self.sites, strict=True)):
            yield DeviceTensor(spec, array, None if self.layers is None else place, site)


def saved_modules(config: ModelConfig, names: Sequence[str]) -> dict[str, Saved]:
    """What `names` choose, by the path of the weight in `Params`: {"embed": ..., "norms.input": ...}.

    A name chooses every module whose full name ends with it, as in PEFT. Raises InputError for a name of a block
    of several modules, or of none.
    """
    found: dict[str, list[tuple[TensorSpec, ModuleSite]]] = {}
    modules = set()
    for path, spec, site in _tensors(config):
        module = spec.name.rpartition(".")[0]
        modules.add(module)
        if module.endswith(tuple(names)):
            found.setdefault(path, []).append((spec, site))
    for name in names:
        _check_name(name, modules)
    saved = {}
    for path, chosen in found.items():
        specs, sites = zip(*chosen, strict=True)
        layers = tuple(layer for _, layer in sites)
        saved[path] = Saved(specs, None if layers == (None,) else layers, sites)
    return saved


def _tensors(config: ModelConfig) -> Iterator[tuple[str, TensorSpec, ModuleSite]]:
    """(path in Params, spec, merging's site) of everything that may be saved."""
    tops = top_specs(config)
    yield "embed", tops["embed"], (EMBED, None)
    head = TensorSpec("lm_head.weight", tops["embed"].shape, tops["embed"].axes)  # tied models have the module too
    yield "head", head, (HEAD, None)
    yield "final_norm", tops["final_norm"], ("final_norm", None)
    for layer in range(config.layers):
        for name, spec in norm_specs(config, layer).items():
            yield f"norms.{name}", spec, (f"{name}_norm", layer)
        for name, spec in weight_specs(config, layer).items():
            yield f"weights.{name}", spec, (name, layer)
        for name, spec in bias_specs(config, layer).items():
            yield f"biases.{name}", spec, (f"{name}.bias", layer)


def _check_name(name: str, modules: set[str]) -> None:
    blocks = {module[:end] for module in modules for end, letter in enumerate(module) if letter == "."}
    if any(block.endswith(name) for block in blocks):
        raise InputError(f"modules_to_save: {name!r} is a block of several modules; name the modules inside it")
    if not any(module.endswith(name) for module in modules):
        raise InputError(f"modules_to_save: no module's name ends with {name!r}; try embed_tokens, lm_head or norm")


def names_saved(config: ModelConfig, names: Sequence[str]) -> list[str]:
    """Those of `names` that choose something: PEFT passes over the others."""
    modules = {spec.name.rpartition(".")[0] for _, spec, _ in _tensors(config)}
    return [name for name in names if any(module.endswith(name) for module in modules)]


def copies(params: Params, saved: Mapping[str, Saved], config: ModelConfig, layout: Layout) -> dict[str, Array]:
    """The first value of what trains: the base's own weights in fp32. `params` may be shapes, inside a trace."""
    return {path: _copy(_weight(params, path), one, config, layout) for path, one in saved.items()}


def _copy(weight: Any, one: Saved, config: ModelConfig, layout: Layout) -> Array:
    shape = one.shape(config)
    if isinstance(weight, jax.ShapeDtypeStruct):  # an estimate: shapes in place of weights
        return jnp.zeros(shape, jnp.float32)
    chosen = weight if weight.shape == shape else weight[np.array(one.layers)]
    return jax.device_put(chosen.astype(jnp.float32), layout.sharding(one.axes, shape))


def _weight(params: Params, path: str) -> Any:
    group, _, name = path.rpartition(".")
    if group:
        weight = getattr(params.layers, group)[name]
        if isinstance(weight, jax.Array | jax.ShapeDtypeStruct):
            return weight
        raise InputError(f"modules_to_save: {name} is quantised in this base; load it unquantised to train {name}")
    return params.embed if name == "head" and params.head is None else getattr(params, name)


def layer_numbers(saved: Mapping[str, Saved]) -> dict[str, Int[np.ndarray, " n"]]:
    """Which layers each stack is of; what lies outside the layers is left out."""
    return {path: np.array(one.layers, np.int32) for path, one in saved.items() if one.layers is not None}


def replaced(params: Params, trained: Mapping[str, Array], layers: Mapping[str, Array]) -> Params:
    """`params` with what trains in place of the base's own weights, in their dtypes; inside jit."""
    groups: dict[str, dict[str, Any]] = {g: dict(getattr(params.layers, g)) for g in ("norms", "weights", "biases")}
    tops: dict[str, Any] = {}
    if "embed" in trained:
        tops["head"] = params.embed if params.head is None else params.head
    for path, value in trained.items():
        old = _weight(params, path)
        value = value.astype(old.dtype)
        group, _, name = path.rpartition(".")
        if not group:
            tops[name] = value
        else:
            groups[group][name] = value if value.shape == old.shape else old.at[layers[path]].set(value)
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, **groups), **tops)


def mergers(saved: Mapping[str, Saved], trained: Mapping[str, Array]) -> dict[ModuleSite, RowsMerger]:
    """The trained weights in place of the base's."""
    tensors = (tensor for path, one in saved.items() for tensor in one.tensors(trained[path]))
    return {tensor.site: partial(_take, tensor) for tensor in tensors if tensor.site}


def _take(tensor: DeviceTensor, block: np.ndarray, rows: slice) -> np.ndarray:
    each = tensor.spec.hf_shape[0] // tensor.units
    return np.asarray(tensor.read(rows.start // each, rows.stop // each), np.float32)


def entries(saved: Mapping[str, Saved], trained: Mapping[str, Array]) -> list[Entry]:
    """The tensors under PEFT's names."""
    tensors = (tensor for path, one in saved.items() for tensor in one.tensors(trained[path]))
    return [Entry(PREFIX + tensor.spec.name, tensor.spec.hf_shape, tensor.blocks) for tensor in tensors]


def file_shapes(saved: Mapping[str, Saved]) -> dict[str, tuple[int, ...]]:
    """What a PEFT file holds of it."""
    return {PREFIX + spec.name: spec.hf_shape for one in saved.values() for spec in one.specs}


class _FiniteSource:
    """A PEFT file as `loading.read_shard` reads a checkpoint."""

    def __init__(self, file: AdapterFile) -> None:
        self._file = file

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        value = self._file.rows(PREFIX + name)[index]
        if not np.isfinite(value.astype(np.float32)).all():
            raise InputError(f"{self._file.path}: {PREFIX + name} holds NaN or infinity")
        return value


def read(file: AdapterFile, saved: Mapping[str, Saved], config: ModelConfig, layout: Layout) -> dict[str, Array]:
    """The trained weights of a PEFT file, each device's part read for it alone."""
    source: Any = _FiniteSource(file)

    def array(one: Saved) -> Array:
        shape = one.shape(config)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            if one.layers is None:
                return read_shard(source, one.specs[0], index, shape, np.dtype(np.float32))
            specs = one.specs[index[0]]
            return np.stack([read_shard(source, s, index[1:], shape[1:], np.dtype(np.float32)) for s in specs])

        return jax.make_array_from_callback(shape, layout.sharding(one.axes, shape), part)

    return {path: array(one) for path, one in saved.items()}
