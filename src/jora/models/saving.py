"""A model back to a Hugging Face directory: weights streamed from the devices, config and tokenizer beside them.

Host memory beyond the device copies is one block of a few MiB, whatever the model's size.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jora.errors import InputError
from jora.files import atomic_directory
from jora.models.bitsandbytes import FINGERPRINT
from jora.models.config import ModelConfig
from jora.models.model import Model
from jora.models.params import Params, pieces_of
from jora.models.safetensors_file import MAX_SHARD_BYTES, Entry, write_sharded
from jora.models.tensors import TensorSpec, bias_specs, norm_specs, top_specs, weight_specs
from jora.quant import HostTensor, QuantisedWeight, host_type
from jora.reporting import SILENT, Reporter
from jora.sharding import Layout, hosts

BLOCK = 4 << 20  # bytes of fp32 handled at a time

# What lies beside the weights and is copied as it is.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


class DeviceTensor(NamedTuple):
    """A checkpoint tensor on the devices: `array`, or one layer of a stack.

    site: (target, layer number), under which a method may change the tensor while it is merged: a linear's name,
    or like "q_proj.bias", "input_norm", "final_norm".
    """

    spec: TensorSpec
    array: Array | QuantisedWeight
    layer: int | None = None
    site: tuple[str, int | None] | None = None

    @property
    def units(self) -> int:
        """Length of the axis that `read` cuts: rows, or heads of a linear layer's output."""
        return self.spec.shape[len(self.spec.shape) - self.spec.outputs if self.spec.outputs else 0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Units [start, stop) in Hugging Face's layout and the device's dtype."""
        assert not isinstance(self.array, QuantisedWeight)  # `blocks` fetches such a weight once
        bounds = [(0, size) for size in self.spec.shape]
        cut = len(bounds) - self.spec.outputs if self.spec.outputs else 0
        bounds[cut] = (start, stop)
        box = read_box(self.array, self.layer, bounds)
        if self.spec.outputs:
            return box.reshape(math.prod(box.shape[:cut]), -1).T
        return box.reshape(-1) if self.spec.name.endswith(".bias") else box

    def blocks(self, change: Callable[[np.ndarray, slice], np.ndarray] | None = None) -> Iterator[np.ndarray]:
        """All rows in order, `BLOCK` bytes at a time; `change(block, rows)` may replace each.

        Those of a quantised weight are what it stands for, in fp32.
        """
        rows_each = self.spec.hf_shape[0] // self.units
        step = max(1, BLOCK * self.units // (4 * math.prod(self.spec.shape)))
        whole = self.quantised() if isinstance(self.array, QuantisedWeight) else None
        for start in range(0, self.units, step):
            stop = min(start + step, self.units)
            rows = slice(start * rows_each, stop * rows_each)
            block = self.read(start, stop) if whole is None else whole.dense(rows.start, rows.stop)
            yield block if change is None else change(block, rows)

    def quantised(self) -> HostTensor:
        """A quantised weight in its files' form."""
        weight, layer = self.array, self.layer
        assert isinstance(weight, QuantisedWeight)
        leaves = jax.tree.leaves(weight)
        pieces = pieces_of(self.spec, Layout(leaves[0].sharding.mesh))
        fields = weight.fields(pieces)
        arrays = {n: read_box(getattr(weight, n), layer, [(0, size) for size in f.shape]) for n, f in fields.items()}
        return host_type(weight.kind).collect(arrays, pieces)


def device_tensors(params: Params, config: ModelConfig) -> Iterator[DeviceTensor]:
    """Every tensor of the checkpoint, in the model's order; a tied head is the embedding and not given again."""
    tops = top_specs(config)
    yield DeviceTensor(tops["embed"], params.embed, site=("embed_tokens", None))
    for number in range(config.layers):
        for name, spec in norm_specs(config, number).items():
            yield DeviceTensor(spec, params.layers.norms[name], number, (f"{name}_norm", number))
        for name, spec in weight_specs(config, number).items():
            yield DeviceTensor(spec, params.layers.weights[name], number, (name, number))
        for name, spec in bias_specs(config, number).items():
            yield DeviceTensor(spec, params.layers.biases[name], number, (f"{name}.bias", number))
    yield DeviceTensor(tops["final_norm"], params.final_norm, site=("final_norm", None))
    if params.head is not None:
        yield DeviceTensor(tops["head"], params.head, site=("lm_head", None))


def read_box(array: Array, layer: int | None, bounds: list[tuple[int, int]]) -> np.ndarray:
    """A box of an array (of one layer of a stack), taken from whichever devices hold it.

    Where some are another process's, all processes must ask for it.
    """
    lead = () if layer is None else (layer,)
    if not array.is_fully_addressable:
        assert isinstance(array.sharding, NamedSharding)
        begin = np.array([*lead, *(start for start, _ in bounds)], np.int32)
        box = _slice_for_all(array.sharding.mesh)(array, begin, (*(1 for _ in lead), *(b - a for a, b in bounds)))
        return np.asarray(box).reshape(box.shape[len(lead) :])
    out = np.empty([stop - start for start, stop in bounds], array.dtype)
    seen = set()
    for shard in array.addressable_shards:
        held = [s.indices(size)[:2] for s, size in zip(shard.index, array.shape, strict=True)][len(lead) :]
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, held, strict=True)]
        if tuple(both) in seen or any(a >= b for a, b in both):
            continue
        seen.add(tuple(both))
        starts = (*lead, *(a - c for (a, _), (c, _) in zip(both, held, strict=True)))
        sizes = (*(1 for _ in lead), *(b - a for a, b in both))
        target = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(both, bounds, strict=True))
        out[target] = np.asarray(_slice(shard.data, np.array(starts, np.int32), sizes)).reshape(sizes[len(lead) :])
    return out


def _slice_of(x: Array, starts: Array, sizes: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(x, tuple(starts), sizes)


_slice = jax.jit(_slice_of, static_argnums=2)


@lru_cache(maxsize=1)
def _slice_for_all(mesh: Mesh) -> Callable[[Array, Any, tuple[int, ...]], Array]:
    """`_slice` whose result every device has."""
    return jax.jit(_slice_of, static_argnums=2, out_shardings=NamedSharding(mesh, PartitionSpec()))


def save_model(
    model: Model,
    directory: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    reporter: Reporter = SILENT,
) -> None:
    """Write a Hugging Face model directory in the model's dtype: weights, config.json, tokenizer.

    Quantised weights are written as bitsandbytes and transformers write them, the same from every mesh.
    An existing model directory is replaced when the new one is whole. Over several hosts all must call it, and the
    first writes. Raises InputError for an existing directory that is no model's.
    """
    dtype, hf_config = np.dtype(model.dtype), dict(model.hf_config)
    if model.quant is not None:
        hf_config["quantization_config"] = host_type(model.quant).quantization_config(dtype.name)
        hf_config[FINGERPRINT] = model.identity["fingerprint"]
    entries = _entries(list(device_tensors(model.params, model.config)), dtype)
    if not hosts.first():
        _give(entries)
        return
    write_model(
        directory,
        entries,
        dtype=dtype,
        hf_config=hf_config,
        source=Path(model.path),
        tokenizer=model._tokenizer,
        max_shard_bytes=max_shard_bytes,
        reporter=reporter,
    )


def _give(entries: Iterable[Entry]) -> None:
    """This host's part of all that the first one writes, in its order."""
    for entry in entries:
        for _ in entry.blocks():
            pass


def _entries(tensors: list[DeviceTensor], dtype: np.dtype) -> Iterator[Entry]:
    """What a file holds of these; a quantised weight is several tensors, and fetched once for all of them."""

    @lru_cache(maxsize=1)
    def stored(number: int) -> dict[str, np.ndarray]:
        tensor = tensors[number]
        return tensor.quantised().stored(tensor.spec.name, dtype.name)

    def part(number: int, name: str) -> list[np.ndarray]:
        return [stored(number)[name]]

    for number, tensor in enumerate(tensors):
        spec, weight = tensor.spec, tensor.array
        if not isinstance(weight, QuantisedWeight):
            yield Entry(spec.name, spec.hf_shape, tensor.blocks)
            continue
        for name, (shape, kind) in host_type(weight.kind).stored_shapes(spec.name, spec.hf_shape).items():
            yield Entry(name, shape, partial(part, number, name), np.dtype(kind))


def write_model(
    directory: str | os.PathLike[str],
    entries: Iterable[Entry],
    *,
    dtype: np.dtype,
    hf_config: Mapping[str, Any],
    source: Path,
    tokenizer: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    reporter: Reporter = SILENT,
) -> None:
    """A Hugging Face directory from named tensors; what lies beside the weights comes from `source`.

    tokenizer: written with `save_pretrained` where the source is a .gguf file.
    """
    target = Path(directory).expanduser()
    check_replaceable(target, "config.json")
    entries = list(entries)
    done = iter(range(1, len(entries) + 1))
    reporter.start(len(entries), f"writing {target.name}, tensors")
    with atomic_directory(target) as temporary:
        write_sharded(temporary, entries, dtype, max_shard_bytes, lambda: reporter.update(next(done)))
        config = json.dumps(_with_dtype(hf_config, dtype), indent=2, ensure_ascii=False)
        (temporary / "config.json").write_text(config + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        elif source.is_dir():
            _copy_companions(source, temporary)
    reporter.finish()


def check_replaceable(directory: Path, marker: str) -> None:
    """Raise InputError if writing `directory` would remove files that no earlier run wrote."""
    if directory.is_file():
        raise InputError(f"{directory}: is a file; name a directory to write")
    if directory.exists() and any(directory.iterdir()) and not (directory / marker).exists():
        raise InputError(f"{directory}: holds other files and no {marker}; name a new or empty directory")


def _with_dtype(hf_config: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    # `torch_dtype` until transformers 4.55, `dtype` since; a file keeps the key that it came with.
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    return {**hf_config, key: dtype.name}


def _copy_companions(source: Path, target: Path) -> None:
    for name in _COMPANIONS:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name)
        elif path.exists():
            shutil.copyfile(path, target / name)
